"""Images that stay in their files until a batch asks for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fdl.datamodules.samples import ImageSamples
from fdl.errors import UserError

CACHE_BELOW = 1 << 30
"""Sets of fewer bytes, decoded, stay in memory once read: rounds go over the same few images again and again."""

_CHANNELS = {1: "L", 3: "RGB"}


class FileSamples(ImageSamples):
    """Images in files, decoded by several threads when first needed.

    Subsets share one store, so an image is decoded once for all of them where the set is small enough to keep.

    Args:
        paths: one image file each.
        labels: classes [n]; None where unlabelled.
        size: images are cut to their central square and resized to size × size.
        channels: 3 for colour, 1 for greyscale.
        mean: as in `ImageSamples`.
        std: as in `ImageSamples`.
        augment: as in `ImageSamples`.

    Raises:
        UserError: from `batch`, naming a file that is no readable image.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor | None = None,
        size: int = 224,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str | None = None,
    ):
        if labels is not None and labels.shape != (len(paths),):
            raise ValueError(f"{len(paths)} files with labels of shape {tuple(labels.shape)}")
        self._store = _ImageStore(paths, size, channels)
        self._rows = torch.arange(len(paths))
        super().__init__(labels, mean, std, augment)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, size, size)."""
        return self._store.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the image files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [self._store.paths[row] for row in self._rows.tolist()]

    def _stored(self, indices: Tensor) -> Tensor:
        return self._store.read(self._rows[indices])

    def _take(self, indices: Tensor) -> dict[str, Any]:
        return {"_rows": self._rows[indices]}

    def _hash_inputs(self, digest: Any) -> None:
        for part in in_threads(_hash_file, self.paths):
            digest.update(part)


class _ImageStore:
    """Decoded images by row, kept in memory when all of them fit in `CACHE_BELOW` bytes."""

    def __init__(self, paths: Sequence[Path], size: int, channels: int):
        self.paths, self.size, self.channels = list(paths), size, channels
        self.shape = (channels, size, size)
        self._kept: Tensor | None = None
        if len(paths) * channels * size * size < CACHE_BELOW:
            self._kept = torch.empty((len(paths), *self.shape), dtype=torch.uint8)  # pages are touched when written
            self._known = torch.zeros(len(paths), dtype=torch.bool)

    def read(self, rows: Tensor) -> Tensor:
        if self._kept is None:
            return self._decode(rows)
        unknown = rows[~self._known[rows]]
        if len(unknown):
            self._kept[unknown] = self._decode(unknown)
            self._known[unknown] = True
        return self._kept.index_select(0, rows)

    def _decode(self, rows: Tensor) -> Tensor:
        images = in_threads(self._decode_one, [self.paths[row] for row in rows.tolist()])
        return torch.from_numpy(np.stack(images)) if images else torch.empty((0, *self.shape), dtype=torch.uint8)

    def _decode_one(self, path: Path) -> np.ndarray:
        return decode(path, self.size, self.channels)


def decode(path: Path, size: int, channels: int) -> np.ndarray:
    """Read one image: central square, resized with antialiasing; 16-bit greyscale is scaled to 8 bits.

    Returns:
        uint8 [channels, size, size].

    Raises:
        UserError: when the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                # Pillow would clip 16-bit values at 255 instead of scaling them
                image = Image.fromarray((np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
            image = ImageOps.fit(image.convert(_CHANNELS[channels]), (size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image, dtype=np.uint8)
    except _UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({_why(error)})") from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def unreadable(paths: Sequence[Path], whole: bool = False) -> dict[Path, str]:
    """Which files are not images, and why.

    Args:
        paths: the files.
        whole: decode every image, to find truncated ones too; else only headers are read.
    """

    def check(path: Path) -> str | None:
        try:
            with Image.open(path) as image:
                if whole:
                    image.load()
        except _UNREADABLE as error:
            return _why(error)
        return None

    return {path: problem for path, problem in zip(paths, in_threads(check, paths)) if problem}


_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _why(error: Exception) -> str:
    return "no image format that is known" if isinstance(error, UnidentifiedImageError) else str(error)


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Map over items, in order, with a few threads: decoding and hashing release the interpreter's lock."""
    items = list(items)
    return [function(item) for item in items] if len(items) < 4 else list(_threads().map(function, items))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="fdl-images")


# a forked loader worker inherits the pool without its threads, and would wait for them for ever
os.register_at_fork(after_in_child=_threads.cache_clear)


def _hash_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
