"""Images in folders that are named after their classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fdl.datamodules.files import FileSamples
from fdl.datamodules.folders import Photo, read_tree
from fdl.datamodules.images import ImageDataModule
from fdl.datamodules.records import existing
from fdl.datamodules.source import Source
from fdl.errors import UserError

log = logging.getLogger("fdl")

_NAMED = 5
"""Maximum number of files that a message names."""


class ImageFolder(ImageDataModule):
    """Images in one folder per class: path/class/*, or path/train/class/* with test and validation next to train.

    With `domain_folders` there is one more level, path/domain/class/* or path/train/domain/class/*, and the domains
    are the natural clients. Splits may have any usual name, in any case (`fdl.datamodules.splits`); a validation split
    without a test split is the test split. Images in folders below that of a class are of that class. All kinds of
    images that Pillow reads are read; other files, empty folders and images without a class are left out and logged.
    Images are decoded when needed: upright, on the background where they are transparent, and in 8 bits.
    Colour is the default; other arguments as in `ImageDataModule`.

    Args:
        path: the folder.
        size: images are cut to their central square and resized to size × size.
        domain_folders: whether there is a level of domains above the classes.
        skip_unreadable: leave out files that cannot be decoded, and log which, at the price of decoding all of them
            once at the start; else an error names them.
        common: the arguments of `ImageDataModule`.

    Raises:
        UserError: when the folder is missing; from `setup` when its folders are not so, or files unreadable.
    """

    name = "image_folder"
    renamed: ClassVar[dict[str, str]] = {"root": "path"}

    def __init__(
        self, path: str, size: int, domain_folders: bool = False, skip_unreadable: bool = False, **common: Any
    ):
        super().__init__(size=size, **common)
        self._path = existing(path)
        self._domains, self._skip = domain_folders, skip_unreadable
        if not self._path.is_dir():
            raise UserError(f"{self._path}: is a file, expected a folder")

    def load(self) -> Source:
        """List the files; headers are read, and the pixels of images of more than 8 bits."""
        splits = self._readable(read_tree(self._path, self._domains))
        classes = sorted({photo.label for photo in splits["train"]})
        samples = {split: self._samples(photos, classes) for split, photos in splits.items()}
        return Source(
            samples["train"],
            classes,
            test=samples.get("test"),
            validation=samples.get("validation"),
            groups=np.array([photo.domain for photo in splits["train"]]) if self._domains else None,
        )

    def place(self, split: str, part: str) -> str:
        """The folder, and the split."""
        return f"{self._path}: {split}"

    def _samples(self, photos: Sequence[Photo], classes: Sequence[str]) -> FileSamples:
        codes = {label: code for code, label in enumerate(classes)}
        for photo in photos:
            if photo.label not in codes:
                near = next((label for label in classes if label.casefold() == photo.label.casefold()), None)
                hint = f"; the training images have {near!r}, spelt otherwise" if near is not None else ""
                raise UserError(f"{photo.path.parent}: class {photo.label!r} has no training images{hint}")
        return self.in_files(
            [photo.path for photo in photos], torch.tensor([codes[photo.label] for photo in photos], dtype=torch.int64)
        )

    def _readable(self, splits: dict[str, list[Photo]]) -> dict[str, list[Photo]]:
        """The images that can be read.

        Raises:
            UserError: naming those that cannot.
        """
        problems = self.survey([photo.path for photos in splits.values() for photo in photos], self._skip).problems
        if not problems:
            return splits
        first = [f"\n  {path}: {why}" for path, why in list(problems.items())[:_NAMED]]
        named = "".join(first) + (f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else "")
        if not self._skip:
            raise UserError(
                f"{self._path}: {len(problems)} file(s) are not readable images; mend or remove them, or set "
                f"skip_unreadable: true{named}"
            )
        log.warning("%s: left out %d file(s) that are not readable images%s", self._path, len(problems), named)
        return {split: [photo for photo in photos if photo.path not in problems] for split, photos in splits.items()}
