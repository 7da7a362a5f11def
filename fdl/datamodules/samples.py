"""Sample sets that are read in whole batches.

Clients are many and small and their steps are short, so a batch is built in one piece from tensors in memory: no
loader workers, no per-sample transforms, no collating.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fdl.modules.types import Batch, Inputs

COPY_BELOW = 64 << 20
"""Subsets of fewer bytes copy their rows: gathers stay cheap, and the memory of the pool can be freed."""

_CHUNK = 512
"""Number of samples per chunk in passes over all samples."""


class Samples(ABC):
    """A fixed, ordered set of examples.

    A subclass implements `__len__`, `nbytes`, `batch`, `subset`, `unlabelled` and `content_hash`; others have defaults.

    Attributes:
        labels: classes, int64 [n]; None where unlabelled.
        width: number of tokens that every batch of texts is padded to; None where a batch is padded to its longest
            text, and for other inputs.
    """

    labels: Tensor | None
    width: int | None = None

    @property
    def lengths(self) -> Tensor | None:
        """Number of tokens of each text, int64 [n], for batches of similar lengths; None for other inputs."""
        return None

    @property
    def at_once(self) -> bool:
        """True where several batches equal one larger batch cut into pieces, also in training.

        False where a batch is padded to its longest text, or augmented.
        """
        return False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, (C, H, W) for images."""
        return tuple(self.batch(torch.zeros(1, dtype=torch.int64))[0].shape[1:])

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the inputs as stored: the cost of sending these samples."""

    @abstractmethod
    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather one batch.

        Args:
            indices: positions of the samples, int64 [B]; e.g. a slice of a permutation.
            generator: stream of the augmentation, in training only; None: no augmentation.
        """

    def stored(self, indices: Tensor) -> Inputs:
        """Return inputs in the form that is copied to a device; `normalised` converts them to those of `batch`.

        By default the inputs of `batch`; a subclass whose inputs are smaller as stored, e.g. images as bytes, overrides
        both methods.

        Args:
            indices: positions of the samples, int64 [B].
        """
        return self.batch(indices)[0]

    def normalised(self, x: Inputs) -> Inputs:
        """Convert stored inputs to those of `batch`, on the device where they are.

        Args:
            x: inputs as returned by `stored`, possibly moved to another device.
        """
        return x

    @abstractmethod
    def subset(self, indices: Any) -> Samples:
        """Select samples by position, in the given order.

        Args:
            indices: positions, a tensor, array or list of integers.
        """

    @abstractmethod
    def unlabelled(self) -> Samples:
        """Return the same inputs without labels."""

    @abstractmethod
    def content_hash(self) -> str:
        """Return the blake2b hash of the inputs in order, without labels; equal for equal inputs of a model."""


class ImageSamples(Samples):
    """Images that are stored unchanged, and normalised and augmented per batch.

    Args:
        labels: classes, int64 [n]; None where unlabelled.
        mean: mean of each channel on the scale where white is 1; None: no normalisation.
        std: standard deviation of each channel on the same scale; None: no normalisation.
        augment: ``"crop_flip"`` (zero padding by an eighth, random crop, random mirror) or None.
    """

    def __init__(
        self,
        labels: Tensor | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str | None = None,
    ):
        self.labels = None if labels is None else labels.to(torch.int64)
        self._hash: str | None = None
        self._set_transform(mean, std, augment)

    @property
    def at_once(self) -> bool:
        """True without augmentation."""
        return self.augment is None

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without reading any."""

    @abstractmethod
    def _stored(self, indices: Tensor) -> Tensor:
        """Inputs as stored, uint8 or float32 [B, …]."""

    @abstractmethod
    def _take(self, indices: Tensor) -> dict[str, Any]:
        """Return the attributes to change in a copy of this object that holds only the given inputs."""

    @abstractmethod
    def _hash_inputs(self, digest: Any) -> None:
        """Feed all inputs, in order, to a hash."""

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather, augment (only with a generator), normalise."""
        x = self._stored(indices)
        if generator is not None and self.augment is not None:
            x = AUGMENTATIONS[self.augment](x, generator)
        return self.normalised(x), None if self.labels is None else self.labels.index_select(0, indices)

    def stored(self, indices: Tensor) -> Tensor:
        """Return inputs as stored, uint8 or float32 [B, …]; bytes are a quarter of the transfer to a GPU."""
        return self._stored(indices)

    def normalised(self, x: Tensor) -> Tensor:
        """Convert stored inputs to those of `batch`, on the device where they are."""
        scale, shift = self._byte_scale if x.dtype == torch.uint8 else self._scale, self._shift
        if x.device.type != "cpu":
            scale, shift = (t.to(x.device, non_blocking=True) if isinstance(t, Tensor) else t for t in (scale, shift))
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).mul_(scale)
            return x if shift is None else x.add_(shift)
        return x if shift is None else x.mul(scale).add_(shift)

    def subset(self, indices: Any) -> ImageSamples:
        """Select samples by position; small sets in memory copy their pixels."""
        indices = as_indices(indices, len(self))
        labels = None if self.labels is None else self.labels[indices]
        return self._changed(labels=labels, **self._take(indices))

    def unlabelled(self) -> ImageSamples:
        """Return the same inputs without labels; the pixels are shared."""
        return self._changed(labels=None)

    def transformed(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, augment: str | None = None
    ) -> ImageSamples:
        """Return the same images with another normalisation and augmentation; the pixels are shared.

        Args:
            mean: mean of each channel, white being 1; None: no normalisation.
            std: standard deviation of each channel; None: no normalisation.
            augment: ``"crop_flip"`` or None.
        """
        changed = self._changed()
        changed._set_transform(mean, std, augment)
        return changed

    def channel_statistics(self, at_most: int = 10_000) -> tuple[list[float], list[float]]:
        """Compute mean and standard deviation of each channel before normalisation, white being 1.

        Args:
            at_most: maximum number of images; larger sets are sampled evenly.
        """
        plain = self.transformed(None, None)
        chosen = torch.linspace(0, len(self) - 1, min(len(self), at_most)).long()
        count, total, squares = 0, 0.0, 0.0
        for indices in chosen.split(_CHUNK):
            x = plain.batch(indices)[0].double().flatten(2)
            count += x.shape[0] * x.shape[2]
            total, squares = total + x.sum((0, 2)), squares + x.square().sum((0, 2))
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        # nine digits: the last bits depend on the number of threads, and the content hash must not
        return [float(f"{m:.9g}") for m in mean.tolist()], [float(f"{s:.9g}") for s in std.tolist()]

    def content_hash(self) -> str:
        """Return the blake2b hash of pixels and normalisation, computed once."""
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(repr((len(self), self.input_shape, self.mean, self.std)).encode())
            self._hash_inputs(digest)
            self._hash = digest.hexdigest()
        return self._hash

    def _changed(self, **changes: Any) -> ImageSamples:
        result = copy.copy(self)
        result.__dict__.update(changes, _hash=None)
        return result

    def _set_transform(self, mean: Sequence[float] | None, std: Sequence[float] | None, augment: str | None) -> None:
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together")
        if augment is not None and augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
        self.mean, self.std = (None, None) if mean is None else (tuple(mean), tuple(std))
        self.augment = augment
        self._scale = self._shift = None
        if mean is not None:
            # a constant channel is only shifted
            std = torch.tensor([s if s > 0 else 1.0 for s in self.std], dtype=torch.float64)
            shape = (-1, *[1] * (len(self.input_shape) - 1))
            self._scale = std.reciprocal().reshape(shape).float()
            self._shift = (-torch.tensor(self.mean, dtype=torch.float64) / std).reshape(shape).float()
        self._byte_scale = 1 / 255 if self._scale is None else self._scale / 255


class TensorSamples(ImageSamples):
    """Examples in memory.

    Args:
        x: inputs [n, …], uint8 (255 is white) or floating point.
        y: classes [n]; None where unlabelled.
        mean: mean of each channel on the scale where white is 1; None: no normalisation.
        std: standard deviation of each channel on the same scale; None: no normalisation.
        augment: ``"crop_flip"`` or None.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str | None = None,
    ):
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TypeError(f"inputs must be uint8 or floating point, got {x.dtype}")
        if y is not None and y.shape != x.shape[:1]:
            raise ValueError(f"{len(x)} inputs with labels of shape {tuple(y.shape)}")
        self._x = x if x.dtype == torch.uint8 else x.to(torch.float32)
        self._rows: Tensor | None = None  # None: all rows of _x in order
        super().__init__(y, mean, std, augment)

    def __len__(self) -> int:
        return (self._x if self._rows is None else self._rows).shape[0]  # len() of a tensor is a Python function

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self._x.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs as they are stored."""
        return len(self) * self._x.nbytes // max(self._x.shape[0], 1)

    @property
    def is_float(self) -> bool:
        """True where the inputs are stored as floating-point numbers."""
        return self._x.is_floating_point()

    def extremes(self) -> tuple[float, float]:
        """Return the smallest and the largest value of all inputs, of which there must be at least one."""
        parts = [self._stored(indices).aminmax() for indices in torch.arange(len(self)).split(_CHUNK)]
        return min(float(part.min) for part in parts), max(float(part.max) for part in parts)

    def not_finite(self) -> int:
        """Count the values that are infinite or NaN."""
        if not self.is_float:
            return 0
        return sum(int((~self._stored(indices).isfinite()).sum()) for indices in torch.arange(len(self)).split(_CHUNK))

    def is_constant(self) -> bool:
        """Test that all values of all inputs are equal."""
        first = self._stored(torch.zeros(1, dtype=torch.int64)).flatten()[:1]
        chunks = torch.arange(len(self)).split(_CHUNK)
        return all(bool((self._stored(indices) == first).all()) for indices in chunks)

    def divided(self, by: float) -> TensorSamples:
        """Return the same samples with every value divided by a number.

        Args:
            by: the divisor.
        """
        return self._changed(_x=self._x / by)

    def _stored(self, indices: Tensor) -> Tensor:
        return self._x.index_select(0, indices if self._rows is None else self._rows[indices])

    def _take(self, indices: Tensor) -> dict[str, Any]:
        rows = indices if self._rows is None else self._rows[indices]
        if len(rows) * self._x[:1].nbytes < COPY_BELOW:
            return {"_x": self._x[rows], "_rows": None}
        return {"_rows": rows}

    def _hash_inputs(self, digest: Any) -> None:
        digest.update(str(self._x.dtype).encode())
        for indices in torch.arange(len(self)).split(_CHUNK):
            digest.update(self._stored(indices).flatten().numpy())


def as_indices(indices: Any, count: int) -> Tensor:
    """Convert positions to an int64 tensor.

    Args:
        indices: positions, a tensor, array or list of integers.
        count: number of samples; positions must be less.

    Raises:
        TypeError: when they are not integers, e.g. a mask.
        IndexError: when one is not in 0 … count-1.
    """
    array = indices.numpy() if isinstance(indices, Tensor) else np.asarray(indices)
    if array.size == 0:
        return torch.empty(0, dtype=torch.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"indices must be integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= count:
        raise IndexError(f"indices must be in 0 … {count - 1}, got {array.min()} … {array.max()}")
    return torch.as_tensor(array.astype(np.int64))


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pad with zeros by an eighth, crop back at a random place, mirror with probability one half.

    He et al. 2016: 4 pixels for 32×32. Every image draws its own place and side.

    Args:
        x: images [B, C, H, W].
        generator: the stream to draw from.
    """
    count, _, height, width = x.shape
    pad = max(1, height // 8), max(1, width // 8)
    top = torch.randint(2 * pad[0] + 1, (count,), generator=generator).tolist()
    left = torch.randint(2 * pad[1] + 1, (count,), generator=generator).tolist()
    mirrored = torch.randint(2, (count,), generator=generator).tolist()
    # copying windows in numpy is several times faster than one gather by index tensors
    padded = F.pad(x, (pad[1], pad[1], pad[0], pad[0])).numpy()
    result = np.empty(x.shape, padded.dtype)
    for i, (y, x0, mirror) in enumerate(zip(top, left, mirrored)):
        window = padded[i, :, y : y + height, x0 : x0 + width]
        result[i] = window[:, :, ::-1] if mirror else window
    return torch.from_numpy(result)


AUGMENTATIONS = {"crop_flip": crop_flip}
