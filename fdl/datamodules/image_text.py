"""Images with captions from files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fdl.datamodules.classes import Classes
from fdl.datamodules.pairs import PairDataModule, PairSamples
from fdl.datamodules.records import SKIP, Record
from fdl.datamodules.source import Source
from fdl.datamodules.tables import TableLayout
from fdl.errors import UserError

log = logging.getLogger("fdl")

_NAMED = 5
"""How many files a message names."""


class ImageText(PairDataModule):
    """Image files with captions in a table: JSONL, JSON, CSV, TSV or parquet, one record an image.

    Images are decoded when needed. Colour is the default; other arguments as in `PairDataModule`.

    Args:
        path: the table, or a folder with one a split.
        size: images are cut to their central square and resized to size × size.
        image_root: folder that the files' names start from; None: the folder of the table.
        file: key of the image file's name.
        caption: key of the caption.
        label: key of the class, a whole number or a name; None: there are no classes.
        classes: names of the classes in the order of their numbers.
        group: key of the natural client or domain; None: there are no groups.
        split: key of the split; records without it are training pairs.
        splits: what the splits are called, by ``train``, ``validation`` and ``test``; None: the usual names.
        where: take only records with these values, by key; a list of values takes any of them.
        skip_unreadable: leave out files that cannot be decoded, and log which, at the price of decoding all of them
            once at the start; else an error names them.
        skip_empty: leave out records without a caption; else an error names the first one.
        delimiter: as in `TableLayout`.
        encoding: as in `TableLayout`.
        common: the other arguments of `PairDataModule`.

    Raises:
        UserError: when there is no table; from `setup`, naming line or file, for what is wrong with it.
    """

    name = "image_text"
    renamed: ClassVar[dict[str, str]] = {"root": "image_root"}

    def __init__(
        self,
        path: str,
        size: int,
        image_root: str | None = None,
        file: str = "file",
        caption: str = "caption",
        label: str | None = None,
        classes: list[str] | None = None,
        group: str | None = None,
        split: str = "split",
        splits: dict[str, str] | None = None,
        where: dict[str, Any] | None = None,
        skip_unreadable: bool = False,
        skip_empty: bool = False,
        delimiter: str | None = None,
        encoding: str | None = None,
        **common: Any,
    ):
        super().__init__(size=size, **common)
        full = (caption,) if skip_empty else ()
        self._layout, self._skip = TableLayout(path, split, splits, where, full, delimiter, encoding), skip_unreadable
        table = Path(path).expanduser()
        folder = table if table.is_dir() else table.parent
        self._root = Path(image_root).expanduser() if image_root else folder
        self._file, self._caption, self._label, self._group = file, caption, label, group
        self._classes = classes

    def load(self) -> Source:
        """Read the table; of the images, headers only."""
        splits = self._readable(self._layout.read().splits)
        classes = Classes.of(splits, self._label, self._classes) if self._label else None
        samples = {split: self._samples(records, classes) for split, records in splits.items()}
        return Source(
            samples["train"],
            classes.names if classes else [],
            test=samples.get("test"),
            validation=samples.get("validation"),
            groups=samples["train"].groups,
        )

    def _samples(self, records: list[Record], classes: Classes | None) -> PairSamples:
        labels = None if classes is None else torch.tensor([classes.code(record) for record in records])
        captions = [record.text(self._caption, SKIP) for record in records]
        groups = np.array([str(record[self._group]) for record in records]) if self._group else None
        return self.pairs(self.in_files([self._path(record) for record in records], labels), captions, groups)

    def _path(self, record: Record) -> Path:
        return self._root / record.text(self._file)

    def _readable(self, splits: dict[str, list[Record]]) -> dict[str, list[Record]]:
        """The records whose images can be read.

        Raises:
            UserError: naming those that cannot.
        """
        records = [record for split in splits.values() for record in split]
        problems = self.survey([self._path(record) for record in records], whole=self._skip).problems
        if not problems:
            return splits
        bad = [record for record in records if self._path(record) in problems]
        first = [f"\n  {r.place}: {self._path(r)}: {_shown(problems[self._path(r)])}" for r in bad[:_NAMED]]
        named = "".join(first) + (f"\n  and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        if not self._skip:
            raise UserError(
                f"{self._layout.path}: {len(bad)} image(s) are missing or not readable; mend or remove them, or set "
                f"skip_unreadable: true{named}"
            )
        log.warning("%s: left out %d image(s) that are missing or not readable%s", self._layout.path, len(bad), named)
        kept = {name: [r for r in split if self._path(r) not in problems] for name, split in splits.items()}
        if not kept["train"]:
            raise UserError(f"{self._layout.path}: none of the training images is readable")
        return {name: split for name, split in kept.items() if split}


def _shown(problem: str) -> str:
    return "no such file" if "No such file" in problem else problem
