"""Base data module of images: size, channels, normalisation, augmentation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.files import FileSamples, Survey, spread_of, survey
from fdl.datamodules.pixels import Range, Reading, colour, white
from fdl.datamodules.ranges import in_unit_range
from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.source import Source
from fdl.errors import UserError

log = logging.getLogger("fdl")

_NAMED = 5
"""Maximum number of files that a message names."""


class ImageDataModule(FederatedDataModule):
    """Base of labelled images of one size.

    Args:
        size: cut images to their central square and resize to size × size; None leaves them as they are.
        channels: 1 for greyscale, 3 for colour; None leaves them as they are.
        normalize: subtract the mean of each channel and divide by its standard deviation. Both come from `mean` and
            `std`, else from published constants of the data set, else from the public proxy set; never from the
            private pool.
        mean: mean of each channel, white being 1.
        std: standard deviation of each channel, white being 1.
        augment: ``"crop_flip"`` (random crop and mirror of private training batches) or ``"none"``. The proxy set is
            never augmented: student and specialists predict the same images.
        value_range: which value is black and which is white in images that are not of 8 bits, e.g. ``[0, 4095]``, or a
            window of Hounsfield units; values beyond are cut off. None: whole numbers have 8, 10, 12, 14 or 16 bits,
            whichever is enough for the largest of all images, and floating-point numbers are 0 … 1 or 0 … 255; the
            chosen range is logged.
        background: colour behind transparent parts of image files: the name of a colour, or ``"#rrggbb"``.
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
        value_range: list[float] | None = None,
        background: str = "white",
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
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise UserError(f"value_range must be two numbers, black and white, the larger last; got {value_range}")
        self.size, self.channels, self.normalize = size, channels, normalize
        self.value_range: Range | None = None if value_range is None else tuple(value_range)
        self._background, self._reading = colour(background), None
        self._given = None if mean is None else (mean, std)
        self._augment = None if augment == "none" else augment

    def postprocess(self) -> None:
        """Set normalisation and augmentation."""
        mean, std = self._statistics() if self.normalize else (None, None)
        self.train = self.train.transformed(mean, std, self._augment)
        for split in ("proxy", "validation", "test"):
            setattr(self, split, getattr(self, split).transformed(mean, std))

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments that the data supply to a module, including the normalisation of the images, if any."""
        mean, std = self.train.mean, self.train.std
        return super().model_kwargs | ({} if mean is None else {"normalization": (list(mean), list(std))})

    def checked(self, source: Source) -> Source:
        """The data set with floating-point images in 0 … 1, after what all data are checked for."""
        return in_unit_range(super().checked(source), self.place, self.value_range is not None)

    def in_memory(self, x: Tensor, y: Tensor | None) -> TensorSamples:
        """Samples of images [n, C, H, W], brought to the wanted size and channels."""
        if self.value_range is not None and x.dtype != torch.uint8:
            black, whitest = self.value_range
            x = ((x.float() - black) / (whitest - black)).clamp_(0, 1)
        return TensorSamples(resized(recoloured(x, self.channels), self.size), y)

    def in_files(self, paths: Sequence[Path], y: Tensor | None) -> FileSamples:
        """Samples of image files, decoded on demand to the wanted size and channels.

        All files of a data set should have been given to `survey` before, which finds out what their values mean; where
        they were not, those of the first call tell.
        """
        if self._reading is None:
            self.survey(paths)
        return FileSamples(paths, y, size=self.size, channels=self.channels or 3, reading=self._reading)

    def survey(self, paths: Sequence[Path], whole: bool = False) -> Survey:
        """Inspect all image files of the data set, and infer black and white of those of more than 8 bits.

        Args:
            paths: the files of all splits.
            whole: decode every image, to find truncated ones too; else only headers are read, and such images as have
                more than 8 bits.

        Raises:
            UserError: images have values that are not those of an image.
        """
        found = survey(paths, whole)
        if found.several:
            first = ", ".join(str(path) for path in found.several[:_NAMED])
            log.warning(
                "%s: of %d files with several images or pages the first is read: %s",
                self.name,
                len(found.several),
                first,
            )
        deep = [path for path in found.deep if path not in found.problems]
        spread = spread_of(deep) if deep and self.value_range is None else {}
        self._reading = self.reading_of(spread, len(deep), len(paths))
        return found

    def reading_of(self, spread: dict[bool, Range], deep: int, total: int) -> Reading:
        """Infer black and white of images of more than 8 bits, and log them.

        Args:
            spread: smallest and largest value, keyed by True for floating-point images and False for whole numbers.
            deep: number of images of more than 8 bits.
            total: number of all images.

        Raises:
            UserError: the values are not those of an image.
        """
        if self.value_range is not None:
            return Reading(self._background, self.value_range, self.value_range)
        found: dict[bool, Range] = {}
        for floats, (low, high) in spread.items():
            kind = "of floating-point numbers" if floats else "of more than 8 bits"
            try:
                found[floats] = 0.0, white(low, high, not floats)
            except UserError as error:
                raise UserError(f"{self.name}: greyscale {kind} {error}") from error
            log.info(
                "%s: greyscale %s (%d of %d images) has values from %g to %g: 0 is taken for black and %g for white; "
                "value_range sets them",
                *(self.name, kind, deep, total, low, high, found[floats][1]),
            )
        return Reading(self._background, found.get(False), found.get(True))

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
