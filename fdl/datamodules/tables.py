"""Records with their splits: from one file, from a file or folder a split, or from a data set of Hugging Face."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdl.datamodules.decoding import checked_encoding
from fdl.datamodules.records import TEXTS, Record, ends_with, existing, read_text
from fdl.datamodules.table_files import TABLES, read_named_table, table_files
from fdl.errors import UserError
from fdl.utils.libraries import library
from fdl.utils.paths import expanded

log = logging.getLogger("fdl")

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""What the field calls each split."""

_HUB = "hub:"
_SAVED = ("dataset_dict.json", "dataset_info.json")


@dataclass
class Table:
    """Records by split.

    Attributes:
        splits: the records of ``"train"``, and of ``"validation"`` and ``"test"`` where there are any.
        names: names of the classes by key, where a data set tells what its numbers mean.
    """

    splits: dict[str, list[Record]]
    names: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TableLayout:
    """Where records are, and which of their keys say where they belong.

    Args:
        path: a JSONL, JSON, CSV or TSV file (also .gz), or a parquet file; a folder of such files, called as their
            splits are, also numbered (``train-00000-of-00002.parquet``) or in folders so called; a folder that the
            library ``datasets`` has saved; or ``hub:name`` or ``hub:name:config`` for a data set on the Hugging Face
            hub.
        split: key of the split; records without it, or with nothing there, are training records.
        splits: which value of it is ``train``, ``validation`` and ``test``, others being left out; None: the usual
            names, with the validation split as the test split where there is no other.
        where: take only records with these values, by key; a list of values takes any of them.
        full: leave out records in which the value of one of these keys is an empty text, or null.
        delimiter: what is between the columns of CSV and TSV files; None: found out from their first lines.
        encoding: of JSON, CSV and TSV files; None: UTF-8, or what a mark at their start says.

    Raises:
        UserError: when there is nothing at the path, or no table; when delimiter or encoding are none.
    """

    path: str
    split: str = "split"
    splits: dict[str, str] | None = None
    where: dict[str, Any] | None = None
    full: tuple[str, ...] = ()
    delimiter: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        checked_encoding(self.encoding)
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise UserError(f"delimiter must be one character, such as ';' or '\\t', got {self.delimiter!r}")
        for name in self.splits or {}:
            if name not in SPLITS:
                raise UserError(f"splits: {name!r} is none of {', '.join(SPLITS)}")
        if not self.path.startswith(_HUB):
            path = existing(self.path)
            if path.is_file() and not ends_with(path, TABLES):
                raise UserError(f"{path}: expected a file of {', '.join(TABLES)}")

    def read(self) -> Table:
        """Read the records.

        Raises:
            UserError: naming the file and line that is wrong.
        """
        return self.sorted(*self._all())

    def sorted(self, records: Iterable[Record], names: dict[str, list[str]] | None = None) -> Table:
        """Choose records by `where`, and sort them into splits.

        Args:
            records: all there are.
            names: as in `Table`.

        Raises:
            UserError: when the splits are not called as expected, or there is nothing to train on.
        """
        found: dict[str, list[Record]] = {}
        empty = 0
        for record in records:
            if any(_is_empty(record[key]) for key in self.full):
                empty += 1
            elif record.within(self.where):
                split = record.fields.get(self.split)
                found.setdefault("train" if split in (None, "") else str(split), []).append(record)
        if empty:
            log.warning("%s: left out %d records with empty texts", self.path, empty)
        splits: dict[str, list[Record]] = {}
        for ours, theirs in self._names(set(found)).items():
            splits[ours] = [record for name in theirs for record in found.get(name, [])]
        if not splits.get("train"):
            raise UserError(f"{self.path}: no training records; splits are {', '.join(sorted(found)) or 'none'}")
        if self.splits is None and not splits["test"] and splits["validation"]:
            splits["test"] = splits.pop("validation")
        return Table({name: rows for name, rows in splits.items() if rows}, names or {})

    def _names(self, found: set[str]) -> dict[str, tuple[str, ...]]:
        """What each of our splits is called in the data."""
        if self.splits is not None:
            for name in self.splits.values():
                if name not in found:
                    raise UserError(f"{self.path}: no split {name!r}; there are {', '.join(sorted(found))}")
            return {ours: (theirs,) for ours, theirs in self.splits.items()}
        unknown = sorted(found - {name for names in SPLITS.values() for name in names})
        if unknown:
            raise UserError(f"{self.path}: unknown split {unknown[0]!r}; set splits to what each split is called")
        return SPLITS

    def _all(self) -> tuple[list[Record], dict[str, list[str]]]:
        if self.path.startswith(_HUB):
            name, _, config = self.path.removeprefix(_HUB).partition(":")
            return _from_datasets(name, config or None, self.split)
        path = existing(self.path)
        if path.is_file():
            return read_named_table(path, self.delimiter, self.encoding)
        if self.is_saved:
            return _from_datasets(path, None, self.split)
        files = self.files()
        if not files:
            raise UserError(f"{path}: no file of {', '.join(TABLES)} in this folder")
        records, names = [], {}
        for split, file in files:
            found, more = read_named_table(file, self.delimiter, self.encoding)
            records += [_with(record, self.split, split) for record in found]
            names |= more
        return records, names

    def files(self) -> list[tuple[str | None, Path]]:
        """The tables in the folder, each with its split, as `table_files`; none where the path is no folder."""
        folder = expanded(self.path)
        known = self.splits.values() if self.splits else [name for names in SPLITS.values() for name in names]
        return table_files(folder, list(known)) if folder.is_dir() else []

    @property
    def is_saved(self) -> bool:
        """Whether the path is a folder that the library ``datasets`` has saved."""
        return any((expanded(self.path) / name).is_file() for name in _SAVED)


def read_folders(
    path: Path, label: str, text: str, split: str, group: str | None, encoding: str | None = None
) -> list[Record]:
    """Texts in one folder a class, with folders of groups above these, and folders of splits above all.

    Args:
        path: the folder.
        label: key under which the record has the name of the folder.
        text: key of the file's text.
        split: key of the split, where there is a folder ``train``.
        group: key of the group; None where there is no such level.
        encoding: as in `read_text`.
    """
    files = [file for file in sorted(path.rglob("*")) if ends_with(file, TEXTS)]
    levels = [
        *([split] if (path / "train").is_dir() else []),
        *([group] if group is not None else []),
        label,
    ]
    records = []
    for file in files:
        parts = file.relative_to(path).parts[:-1]
        if len(parts) == len(levels):
            records.append(Record(str(file), {**dict(zip(levels, parts)), text: read_text(file, encoding)}))
    if not records:
        order = "/".join(["split"] * (split in levels) + ["group"] * (group is not None) + ["class"])
        raise UserError(f"{path}: no texts in {path.name}/{order}/ ({', '.join(TEXTS)})")
    return records


def _from_datasets(source: str | Path, config: str | None, split_key: str) -> tuple[list[Record], dict[str, list[str]]]:
    """All splits of a data set of the library ``datasets``."""
    datasets = library("datasets", "datasets", str(source), has="load_dataset")
    try:
        if isinstance(source, Path):
            data = datasets.load_from_disk(str(source))
        else:
            data = datasets.load_dataset(source, config)
    except Exception as error:  # the library raises whatever its loaders, and those of its files, raise
        raise UserError(f"{source}: the library datasets cannot load it ({error})") from error
    splits = data if isinstance(data, dict) else {"train": data}
    records = [
        Record(f"{source}: {split} record {i}", {**row, split_key: split})
        for split, rows in splits.items()
        for i, row in enumerate(rows)
    ]
    features = next(iter(splits.values())).features
    return records, {key: list(kind.names) for key, kind in features.items() if getattr(kind, "names", None)}


def _is_empty(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _with(record: Record, key: str, value: str | None) -> Record:
    return record if value is None or key in record.fields else Record(record.place, {**record.fields, key: value})
