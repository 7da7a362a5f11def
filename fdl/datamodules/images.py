"""What all image data share: size, channels, normalisation, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.files import FileSamples
from fdl.datamodules.samples import TensorSamples
from fdl.errors import UserError


class ImageDataModule(FederatedDataModule):
    """Base of labelled images of one size.

    Args:
        size: cut images to their central square and resize to size × size; None leaves them as they are.
        channels: 1 for greyscale, 3 for colour; None leaves them as they are.
        normalize: subtract the mean of each channel and divide by its standard deviation. Both come from `mean` and
            `std`, else from published constants of the data set, else from the public proxy set; never from the
            private pool.
        mean: of each channel, white being 1.
        std: likewise.
        augment: ``"crop_flip"`` (random crop and mirror of private training batches) or ``"none"``. The proxy set is
            never augmented: student and specialists answer the same images.
        common: the arguments of `FederatedDataModule`.

    Raises:
        UserError: for values out of range; from `setup` when there is nothing public to normalise with.
    """

    published: ClassVar[tuple[Sequence[float], Sequence[float]] | None] = None
    """Mean and standard deviation in the literature, None where there are none."""

    def __init__(
        self,
        size: int | None = None,
        channels: Literal[1, 3] | None = None,
        normalize: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: Literal["none", "crop_flip"] = "none",
        **common: Any,
    ):
        super().__init__(**common)
        if size is not None and size < 1:
            raise UserError(f"size must be at least 1, got {size}")
        if channels not in (None, 1, 3):
            raise UserError(f"channels must be 1 or 3, got {channels}")
        if augment not in ("none", "crop_flip"):
            raise UserError(f"augment must be 'none' or 'crop_flip', got {augment!r}")
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
            raise UserError(f"mean and std need one value a channel each, got mean {mean} and std {std}")
        if mean is not None and not normalize:
            raise UserError("mean and std are given, but normalize is false")
        if std is not None and min(std) <= 0:
            raise UserError(f"std must be > 0, got {std}")
        self.size, self.channels, self.normalize = size, channels, normalize
        self._given = None if mean is None else (mean, std)
        self._augment = None if augment == "none" else augment

    def finish(self) -> None:
        """Set normalisation and augmentation."""
        mean, std = self._statistics() if self.normalize else (None, None)
        self.train = self.train.transformed(mean, std, self._augment)
        for split in ("proxy", "validation", "test"):
            setattr(self, split, getattr(self, split).transformed(mean, std))

    @property
    def provides(self) -> dict[str, Any]:
        """What the data tell a module: also the normalisation that images come with, where they have one."""
        mean, std = self.train.mean, self.train.std
        return super().provides | ({} if mean is None else {"normalization": (list(mean), list(std))})

    def in_memory(self, x: Tensor, y: Tensor | None) -> TensorSamples:
        """Samples of images [n, C, H, W], brought to the wanted size and channels."""
        return TensorSamples(resized(recoloured(x, self.channels), self.size), y)

    def in_files(self, paths: Sequence[Path], y: Tensor | None) -> FileSamples:
        """Samples of image files, decoded on demand to the wanted size and channels."""
        return FileSamples(paths, y, size=self.size, channels=self.channels or 3)

    def _statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        channels = self.input_shape[0]
        if self._given is not None:
            if len(self._given[0]) != channels:
                raise UserError(f"{self.name}: mean has {len(self._given[0])} values for {channels} channels")
            return self._given
        if self.published is not None and len(self.published[0]) == channels:
            return self.published
        if len(self.proxy) == 0:
            raise UserError(f"{self.name}: normalize needs a public proxy set, or mean and std")
        return self.proxy.channel_statistics()


def resized(x: Tensor, size: int | None) -> Tensor:
    """Central square of images [n, C, H, W], resized to [n, C, size, size] with antialiasing; dtype unchanged."""
    if size is None or x.shape[2:] == (size, size):
        return x
    side = min(x.shape[2:])
    squares = transforms.center_crop(x, [side, side])
    # in pieces, since resizing works in floating point
    return torch.cat([transforms.resize(part, [size, size], antialias=True) for part in squares.split(1024)])


def recoloured(x: Tensor, channels: int | None) -> Tensor:
    """Images [n, C, H, W] as greyscale (ITU-R 601 luma) or colour; dtype unchanged.

    Raises:
        UserError: for images that are neither.
    """
    if channels is None or x.shape[1] == channels:
        return x
    if x.shape[1] not in (1, 3):
        raise UserError(f"images with {x.shape[1]} channels cannot be turned into {channels}")
    return x.repeat(1, 3, 1, 1) if channels == 3 else transforms.rgb_to_grayscale(x)
