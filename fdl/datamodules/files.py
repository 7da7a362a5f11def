"""Images that stay in their files until a batch asks for them."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fdl.datamodules.pixels import PLAIN, Range, Reading, extremes, flat, is_deep, is_float
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
        reading: what the files' values mean.

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
        reading: Reading = PLAIN,
    ):
        if labels is not None and labels.shape != (len(paths),):
            raise ValueError(f"{len(paths)} files with labels of shape {tuple(labels.shape)}")
        self._store = _ImageStore(paths, size, channels, reading)
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
        digest.update(repr(self._store.reading).encode())
        for part in in_threads(_hash_file, self.paths):
            digest.update(part)


class _ImageStore:
    """Decoded images by row, kept in memory when all of them fit in `CACHE_BELOW` bytes."""

    def __init__(self, paths: Sequence[Path], size: int, channels: int, reading: Reading):
        self.paths, self.size, self.channels, self.reading = list(paths), size, channels, reading
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
        return decode_image(path, self.size, self.channels, self.reading)


def decode_image(path: Path, size: int, channels: int, reading: Reading = PLAIN) -> np.ndarray:
    """Read one image as a viewer shows it: its central square, resized with antialiasing.

    Args:
        path: the file, or one that is open for reading bytes.
        size: height and width of the result.
        channels: 3 for colour, 1 for greyscale.
        reading: what the file's values mean.

    Returns:
        uint8 [channels, size, size].

    Raises:
        UserError: when the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            shown = flat(image, reading).convert(_CHANNELS[channels])
            shown = ImageOps.fit(shown, (size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(shown, dtype=np.uint8)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({_why(error)})") from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@dataclass
class Survey:
    """What the headers of image files tell.

    Attributes:
        problems: which files are no images, and why.
        deep: greyscale images of more than 8 bits.
        several: files of more than one image or page, of which the first is read.
    """

    problems: dict[Path, str] = field(default_factory=dict)
    deep: list[Path] = field(default_factory=list)
    several: list[Path] = field(default_factory=list)


def survey(paths: Sequence[Path], whole: bool = False) -> Survey:
    """Look at image files.

    Args:
        paths: the files.
        whole: decode every image, to find truncated ones too; else only headers are read.
    """

    def look(path: Path) -> tuple[str | None, bool, bool]:
        try:
            with Image.open(path) as image:
                several = getattr(image, "is_animated", False)
                if whole:
                    image.seek(0)
                    image.load()
                return None, is_deep(image), several
        except _UNREADABLE as error:
            return _why(error), False, False

    found = Survey()
    for path, (problem, deep, several) in zip(paths, in_threads(look, paths)):
        if problem is not None:
            found.problems[path] = problem
        if deep:
            found.deep.append(path)
        if several:
            found.several.append(path)
    return found


def spread_of(paths: Sequence[Path], places: Sequence[str] = ()) -> dict[bool, Range]:
    """The smallest and largest value of images, by whether they are of floating-point numbers.

    Args:
        paths: the files, or ones that are open for reading bytes.
        places: what to call each in messages; its path where there are none.

    Raises:
        UserError: naming a file that is no readable image, or holds numbers that are not finite.
    """

    def look(path_and_place: tuple[Path, str]) -> tuple[bool, Range]:
        path, place = path_and_place
        try:
            with Image.open(path) as image:
                return is_float(image), extremes(image)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        except _UNREADABLE as error:
            raise UserError(f"{place}: not a readable image ({_why(error)})") from error

    found: dict[bool, Range] = {}
    for floats, (low, high) in in_threads(look, zip(paths, places or map(str, paths))):
        before = found.get(floats, (low, high))
        found[floats] = min(low, before[0]), max(high, before[1])
    return found


_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


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
