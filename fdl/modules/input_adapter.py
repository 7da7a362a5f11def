"""Conversion of the data's images to the format that a pretrained backbone expects, as part of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdl.errors import UserError
from fdl.utils.suggest import suggest

# ITU-R 601 luma, with which torchvision and Pillow convert colour to grey
_LUMA = (0.2989, 0.587, 0.114)


class InputAdapter(nn.Module):
    """Resizing, channel conversion, and replacement of the data's normalisation by the backbone's.

    It consists of one affine map per channel and one resampling, which is linear as well: the result equals resizing
    the image before normalisation, without a second copy of the data in another size. Nothing is clipped, so cubic
    resampling may overshoot, as in ``torchvision.transforms`` for tensors. It has no weights: nothing is stored, sent
    or averaged.

    Args:
        input_shape: (C, H, W) of the data's images.
        size: height and width that the backbone expects; None: those of the data.
        channels: number of channels that the backbone expects, 1 or 3; None: that of the data. Grey is converted to
            colour by repetition, colour to grey by its luma.
        mean: per-channel mean of the normalisation that the backbone expects, for pixels in [0, 1]; None: not
            normalised.
        std: per-channel standard deviation of the same normalisation.
        data_mean: per-channel mean with which the data are already normalised, for pixels in [0, 1]; None: they are
            not.
        data_std: per-channel standard deviation with which the data are already normalised.
        interpolation: method of resizing.
        antialias: apply a low-pass filter when shrinking; no effect when enlarging.

    Attributes:
        output_shape: (C, H, W) of the converted images.
        mean: per-channel mean with which the converted images are normalised.
        std: per-channel standard deviation with which the converted images are normalised.

    Raises:
        UserError: values contradict each other.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        size: Sequence[int] | None = None,
        channels: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        data_mean: Sequence[float] | None = None,
        data_std: Sequence[float] | None = None,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        antialias: bool = True,
    ):
        super().__init__()
        own, *data_size = input_shape
        channels = own if channels is None else channels
        if channels != own and {channels, own} != {1, 3}:
            raise UserError(f"adapt: images of {own} channels cannot be turned into {channels}")
        if interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"adapt.interpolation must be bicubic or bilinear, got {interpolation!r}")
        self.mean, self.std = _pair("", mean, std, channels)
        mean, std = _tensors(self.mean, self.std)
        data_mean, data_std = _tensors(*_pair("data_", data_mean, data_std, own))
        self.size = tuple(data_size) if size is None else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"adapt.size must be height and width in pixels, got {list(self.size)}")
        self.output_shape = (channels, *self.size)
        self.interpolation, self.antialias, self._resize = interpolation, antialias, self.size != tuple(data_size)
        # y = (std_d·x + mean_d − mean) / std, with the luma of std_d·x + mean_d when converting colour to grey
        colours, scale, shift = None, data_std / std, (data_mean - mean) / std
        if channels < own:
            luma = torch.tensor(_LUMA, dtype=torch.float64)
            colours, scale, shift = luma * data_std, 1 / std, ((luma * data_mean).sum() - mean) / std
        for name, value in (("colours", colours), ("scale", scale), ("shift", shift)):
            value = None if value is None else value.float().reshape(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convert images ``[B, C, H, W]`` to ``[B, *output_shape]``, in the precision of the input."""
        dtype, x = x.dtype, x.float()  # half-precision pixels would be resampled too coarsely
        if self.colours is not None:
            x = (x * self.colours).sum(1, keepdim=True)
        if self._resize:
            x = F.interpolate(x, size=self.size, mode=self.interpolation, antialias=self.antialias, align_corners=False)
        return torch.addcmul(self.shift, x, self.scale).to(dtype)  # grey is broadcast over three scales

    def extra_repr(self) -> str:
        """Return the description shown when a network is printed."""
        return f"output_shape={self.output_shape}, interpolation={self.interpolation!r}, antialias={self.antialias}"


def adapter_for(
    adapt: bool | Mapping[str, Any] | None,
    input_shape: Sequence[int],
    normalization: Sequence[Sequence[float]] | None,
    published: Mapping[str, Any],
    wanted: bool = False,
) -> InputAdapter | None:
    """Create the adapter for the `adapt` argument of a module.

    Args:
        adapt: True: all settings from `published`; a mapping: these settings override the published ones (the arguments
            of `InputAdapter`, ``size`` as one number or two); False: no adapter; None: decided by `wanted`.
        input_shape: (C, H, W) of the data.
        normalization: per-channel mean and standard deviation with which the data are normalised; None if they are not.
        published: ``size``, ``channels``, ``mean``, ``std`` and ``interpolation`` of the backbone, as far as known.
        wanted: create an adapter if `adapt` is None.

    Returns:
        The adapter; None if images are passed to the network as they are.

    Raises:
        UserError: a key is unknown or a value is not valid.
    """
    if adapt is False or (adapt is None and not wanted):
        return None
    known = ("size", "channels", "mean", "std", "data_mean", "data_std", "interpolation", "antialias")
    given = dict(adapt) if isinstance(adapt, Mapping) else {}
    for key in given:
        if key not in known:
            raise UserError(f"adapt: unknown key {key!r}{suggest(key, known, few=0)}")
    if isinstance(given.get("size"), int):
        given["size"] = (given["size"], given["size"])
    settings = {key: value for key, value in published.items() if value is not None} | given
    if normalization is not None:
        settings = {"data_mean": normalization[0], "data_std": normalization[1], **settings}
    return InputAdapter(input_shape, **settings)


def _pair(
    prefix: str, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of each channel; 0 and 1 if they are None."""
    if (mean is None) != (std is None):
        raise UserError(f"adapt: {prefix}mean and {prefix}std go together")
    mean, std = ([0.0] * channels, [1.0] * channels) if mean is None else (list(mean), list(std))
    if channels == 1 and len(mean) == len(std) == 3:  # a colour backbone reduced to one channel
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(
            f"adapt: {prefix}mean and {prefix}std need one value, and a positive std, for each of {channels} "
            f"channels, got {mean} and {std}"
        )
    return mean, std


def _tensors(*values: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(one, dtype=torch.float64) for one in values]
