"""Records of tables, by the kind of file, and which files of a folder are tables of which split."""

from __future__ import annotations

import csv
import json
import re
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fdl.datamodules.decoding import read_decoded
from fdl.datamodules.records import Record, ends_with, stem
from fdl.errors import UserError
from fdl.utils.libraries import library

TABLES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".json", ".json.gz")
"""Suffixes of files of records."""

_JSON = (".json", ".json.gz")
_DELIMITERS = (",", "\t", ";", "|")
_SAMPLE = 1 << 16
_SHARD = re.compile(r"(?P<name>.+?)[-_]\d+(-of-(?P<count>\d+))?(-[0-9a-f]{8,})?")
_PART = re.compile(r"part[-_.]\d+")

Names = dict[str, list[str]]


def read_table(path: Path, delimiter: str | None = None, encoding: str | None = None) -> list[Record]:
    """The records of a JSONL, JSON, CSV, TSV or parquet file; CSV and TSV begin with a line of column names.

    Args:
        path: the file.
        delimiter: what is between the columns of CSV or TSV; None: found out from the first lines.
        encoding: as in `read_decoded`.

    Raises:
        UserError: naming the line that is no JSON object, or has another number of columns.
    """
    return read_named_table(path, delimiter, encoding)[0]


def read_named_table(
    path: Path, delimiter: str | None = None, encoding: str | None = None
) -> tuple[list[Record], Names]:
    """As `read_table`, with the names of classes by key that some parquet files have for their numbers."""
    names: Names = {}
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        records, names = _parquet(path)
    elif kind in ("jsonl", "json"):
        records = read_decoded(path, lambda file: _json(path, file), encoding)
    else:
        records = read_decoded(path, lambda file: _delimited(path, file, delimiter), encoding)
    if not records:
        raise UserError(f"{path}: the file has no records")
    return records, names


def table_files(folder: Path, splits: Collection[str]) -> list[tuple[str | None, Path]]:
    """The tables in a folder, or in folders in it that are named after splits.

    Files of one split may be numbered, such as ``train-00000-of-00003.parquet``. A .json beside other tables only
    describes them.

    Args:
        folder: where to look.
        splits: what splits are called.

    Returns:
        Split and file, in the order of the names; None for the split where neither file nor folder is named after one,
        as ``part-00000.parquet``.

    Raises:
        UserError: when numbered files are not all there.
    """
    found = []
    if not any(not ends_with(file, _JSON) for file in _tables_in(folder)):
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            split = inner.name.removeprefix("split=")
            if split in splits:
                _require_all(files := _tables_in(inner))
                found += [(split, file) for file in files]
    if not found:
        _require_all(files := _tables_in(folder))
        found = [(_split_of(stem(file), splits), file) for file in files]
    return found


def _tables_in(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if ends_with(file, TABLES)]
    return [file for file in files if not ends_with(file, _JSON)] or files


def _split_of(name: str, splits: Collection[str]) -> str | None:
    """Infer the split from a file's name; None for a part of the whole data set."""
    if name in splits:
        return name
    if name.isdecimal() or _PART.match(name):
        return None
    shard = _SHARD.fullmatch(name)
    return shard["name"] if shard is not None and (shard["count"] or shard["name"] in splits) else name


def _require_all(files: list[Path]) -> None:
    """Find out if some of `1-of-n`, …, `n-of-n` are missing."""
    series: dict[tuple[str, int], int] = {}
    for file in files:
        shard = _SHARD.fullmatch(stem(file))
        if shard is not None and shard["count"]:
            key = shard["name"], int(shard["count"])
            series[key] = series.get(key, 0) + 1
    for (name, count), there in series.items():
        if there != count:
            raise UserError(f"{files[0].parent}: {there} of the {count} files {name}-…-of-{count:05} are there")


# -- JSON --------------------------------------------------------------------------------------------------------


def _json(path: Path, file: TextIO) -> list[Record]:
    """An object a line, or one list of objects."""
    first = next((letter for letter in iter(lambda: file.read(1), "") if not letter.isspace()), "")
    file.seek(0)
    if first == "[":
        return _json_list(path, file)
    records = [Record(f"{path}: line {line}", row) for line, row in _json_lines(path, file)]
    if len(records) == 1 and ends_with(path, _JSON) and all(isinstance(v, dict) for v in records[0].fields.values()):
        raise UserError(
            f"{path}: expected a list of objects, or one object a line; this is one object by column (in pandas, write "
            "with orient='records')"
        )
    return records


def _json_list(path: Path, file: TextIO) -> list[Record]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}: not valid JSON ({error.msg} at character {error.colno - 1}); expected a "
            "list of objects, or one object a line"
        ) from error
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: record {i}: expected a JSON object, got {row!r:.60}")
    return [Record(f"{path}: record {i}", row) for i, row in enumerate(rows)]


def _json_lines(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            hint = "; expected one object a line" if text.strip() in ("{", "}") else ""
            raise UserError(
                f"{path}: line {line}: not valid JSON ({error.msg} at character {error.pos}){hint}"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {line}: expected a JSON object, got {text.strip()[:60]}")
        yield line, row


# -- columns -----------------------------------------------------------------------------------------------------

_LIMIT = threading.Lock()


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the limit on fields, which the library `csv` has for the whole process, while a file is read."""
    with _LIMIT:
        before = csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _delimited(path: Path, file: TextIO, delimiter: str | None) -> list[Record]:
    """Lines of columns; the first line has their names."""
    with _fields_of_any_length():
        sample, skipped = file.read(_SAMPLE), 0
        file.seek(0)
        if given := re.match(r"sep=(.)\r?\n", sample):  # Excel's own line, which is no record
            skipped, delimiter = 1, delimiter or given[1]
            file.readline()
        own = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
        # files with tabs between columns, such as GLUE's, do not quote, unless they quote all
        plain = own == "\t" and not sample.startswith('"')
        quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
        delimiter = delimiter or _found_delimiter(sample[given.end() if given else 0 :], own, quoting)
        lines = _Lines(file)
        rows = csv.DictReader(lines, delimiter=delimiter, quoting=quoting)
        records = []
        try:
            for row in rows:
                place = f"{path}: line {rows.line_num + skipped}"
                if None in row or None in row.values():
                    columns = f"{len(rows.fieldnames)} columns, as in the first line, with {delimiter!r} between them"
                    raise UserError(f"{place}: expected {columns}; set delimiter if another is meant")
                records.append(Record(place, row))
                last = lines.taken()
            if records and not plain:
                list(
                    csv.reader(last, delimiter=delimiter, strict=True)
                )  # only strict parsing detects an unclosed quote
        except csv.Error as error:
            if "unexpected end of data" not in str(error):
                raise UserError(f"{path}: line {rows.line_num + skipped}: {error}") from error
            start = rows.line_num + skipped - len(last) + 1
            raise UserError(f"{path}: line {start}: a quotation mark is opened here and never closed") from error
    return records


class _Lines:
    """Lines of a file, of which those since the last record are remembered."""

    def __init__(self, file: TextIO):
        self._file, self._lines = file, []

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self._lines.append(line)
            yield line

    def taken(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _found_delimiter(sample: str, own: str, quoting: int) -> str:
    """Detect the delimiter from a file's first lines: that of its suffix if it fits, else the one with most columns."""
    columns, regular = {}, {}
    for delimiter in (own, *_DELIMITERS):
        rows = csv.reader(StringIO(sample, newline=""), delimiter=delimiter, quoting=quoting)
        counts = [len(row) for row in islice(rows, 20) if row]
        counts = counts[:-1] if len(sample) == _SAMPLE and len(counts) > 2 else counts  # the last may be cut
        columns[delimiter] = counts[0] if counts else 1
        regular[delimiter] = columns[delimiter] > 1 and len(set(counts)) == 1
    if regular[own]:
        return own
    return max(columns, key=lambda delimiter: (regular[delimiter], columns[delimiter]))


# -- parquet -----------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> tuple[list[Record], Names]:
    """All rows, and what the library `datasets` notes of the names of classes."""
    parquet = library("pyarrow.parquet", "parquet", str(path))
    try:
        table = parquet.read_table(path, partitioning=None)
        rows = table.to_pylist()
    except Exception as error:  # pyarrow has errors of its own, and of the system below it
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable parquet file ({reason:.200})") from error
    return [Record(f"{path}: record {i}", row) for i, row in enumerate(rows)], _noted(table.schema.metadata or {})


def _noted(metadata: dict[bytes, bytes]) -> Names:
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            key: list(kind["names"]) for key, kind in features.items() if isinstance(kind, dict) and "names" in kind
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
