"""Images in folders that are named after their classes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdl.datamodules.base import Source
from fdl.datamodules.files import FileSamples, unreadable
from fdl.datamodules.images import ImageDataModule
from fdl.errors import UserError

log = logging.getLogger("fdl")

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class ImageFolder(ImageDataModule):
    """Images in one folder a class: root/class/*, or root/train/class/* with test and val beside train.

    With `domain_folders` there is one more level, root/domain/class/* or root/train/domain/class/*, and the domains
    are the natural clients. A folder ``val`` without ``test`` is the test split, with it the validation split.
    Images are decoded when needed. Colour is the default; other arguments as in `ImageDataModule`.

    Args:
        root: the folder.
        size: images are cut to their central square and resized to size × size.
        domain_folders: whether there is a level of domains above the classes.
        skip_unreadable: leave out files that cannot be decoded, and log which, at the price of decoding all of them
            once at the start; else an error names them.
        common: the arguments of `ImageDataModule`.

    Raises:
        UserError: when the folder is missing; from `setup` when it holds no classes or unreadable files.
    """

    name = "image_folder"

    def __init__(
        self, root: str, size: int, domain_folders: bool = False, skip_unreadable: bool = False, **common: Any
    ):
        super().__init__(size=size, **common)
        self._root = Path(root).expanduser()
        self._domains, self._skip = domain_folders, skip_unreadable
        if not self._root.is_dir():
            raise UserError(f"{self._root}: no such folder")

    def load(self) -> Source:
        """List the files; headers are read, pixels are not."""
        split = (self._root / "train").is_dir()
        train = self._files(self._root / "train" if split else self._root)
        others = [self._files(self._root / name) for name in ("test", "val") if split and (self._root / name).is_dir()]
        classes = sorted({label for _, label, _ in train})
        samples = [self._samples(files, classes) for files in (train, *others)]
        return Source(
            samples[0],
            classes,
            test=samples[1] if others else None,
            validation=samples[2] if len(others) == 2 else None,
            groups=np.array([domain for _, _, domain in train]) if self._domains else None,
        )

    def _samples(self, files: list[tuple[Path, str, str]], classes: list[str]) -> FileSamples:
        codes = {label: code for code, label in enumerate(classes)}
        unknown = next((path for path, label, _ in files if label not in codes), None)
        if unknown is not None:
            raise UserError(f"{unknown.parent}: class {unknown.parent.name!r} has no training images")
        return self.in_files([path for path, _, _ in files], torch.tensor([codes[label] for _, label, _ in files]))

    def _files(self, folder: Path) -> list[tuple[Path, str, str]]:
        """Readable images below a folder: (path, class, domain), in the order of their names."""
        domains = _folders(folder) if self._domains else [folder]
        found = [
            (path, label.name, domain.name)
            for domain in domains
            for label in _folders(domain)
            for path in _sorted(label, lambda p: p.is_file() and p.suffix.lower() in _SUFFIXES)
        ]
        if not found:
            levels = "domain/class" if self._domains else "class"
            raise UserError(f"{folder}: no images in {folder.name}/{levels}/ ({', '.join(sorted(_SUFFIXES))})")
        problems = unreadable([path for path, _, _ in found], whole=self._skip)
        if problems:
            first = [f"\n  {path}: {why}" for path, why in list(problems.items())[:5]]
            named = "".join(first) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
            if not self._skip:
                raise UserError(
                    f"{folder}: {len(problems)} file(s) are not readable images; mend or remove them, or set "
                    f"skip_unreadable: true{named}"
                )
            log.warning("%s: left out %d file(s) that are not readable images%s", folder, len(problems), named)
        return [file for file in found if file[0] not in problems]


def _folders(folder: Path) -> list[Path]:
    return _sorted(folder, Path.is_dir)


def _sorted(folder: Path, keep: Callable[[Path], bool]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and keep(path))
