"""Reading texts and tables from files, with messages that name file and line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fdl.errors import UserError

SKIP = "; set skip_empty: true to leave such ones out"
"""Advice on empty texts, for data modules that have this argument."""

TEXTS = (".txt", ".md", ".txt.gz", ".md.gz")
"""How the names of files of plain text end."""

TABLES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
"""How the names of files with a record a line end."""
UNPAIRED = frozenset(map(chr, range(0xD800, 0xE000)))
"""Halves of surrogate pairs: escapes in JSON or Python can make them, UTF-8 and tokenizers have none."""


@dataclass(frozen=True)
class Record:
    """One line of a table.

    Attributes:
        place: file and line, for messages.
        fields: its values by key.
    """

    place: str
    fields: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The value of a key.

        Raises:
            UserError: when the line has no such key.
        """
        try:
            return self.fields[key]
        except KeyError:
            known = ", ".join(map(repr, self.fields)) or "none"
            raise UserError(f"{self.place}: no key {key!r}; there are {known}") from None

    def text(self, key: str, advice: str = "") -> str:
        """A value that has to be a text, and not an empty one; `advice` as in `checked_text`.

        Raises:
            UserError: when it is something else.
        """
        return checked_text(self[key], f"{self.place}: {key!r}", advice)

    def within(self, where: dict[str, Any] | None) -> bool:
        """Whether every key of `where` has its value here; one of a list of values also does."""
        wanted = {key: value if isinstance(value, list) else [value] for key, value in (where or {}).items()}
        return all(self[key] in values for key, values in wanted.items())


def checked_text(value: Any, place: str, advice: str = "") -> str:
    """A value that has to be a text, and not an empty one.

    Args:
        value: the value.
        place: where it stands, for messages.
        advice: what to do about an empty text, to end a message with.

    Raises:
        UserError: beginning with the place, when it is something else.
    """
    if not isinstance(value, str):
        raise UserError(f"{place} must be a text, got {value!r:.60}")
    if not value.strip():
        raise UserError(f"{place} is an empty text{advice}")
    if not UNPAIRED.isdisjoint(value):
        raise UserError(f"{place} has half of a surrogate pair, which is no character")
    return value


def existing(path: str) -> Path:
    """A path that the user gave.

    Raises:
        UserError: when there is nothing.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{found}: no such file or folder")
    return found


def ends_with(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether it is a file whose name ends so, in whatever case."""
    return path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(suffixes)


def stem(path: Path) -> str:
    """The name without its suffixes of `TEXTS` and `TABLES`."""
    suffix = next((s for s in sorted((*TEXTS, *TABLES), key=len, reverse=True) if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def read_text(path: Path) -> str:
    """The whole text of a file in UTF-8, unpacked where it ends in .gz; line ends are left as they are.

    Raises:
        UserError: when it cannot be read, is no UTF-8, or empty.
    """
    text = _read(path, lambda file: file.read())
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def read_table(path: Path) -> list[Record]:
    """The records of a JSONL, CSV or TSV file; the latter two begin with a line of column names.

    Raises:
        UserError: naming the line that is no JSON object, or has another number of columns.
    """
    suffixes = path.name.lower().removesuffix(".gz")
    read = _json_lines if suffixes.endswith(".jsonl") else _delimited("\t" if suffixes.endswith(".tsv") else ",")
    records = _read(path, lambda file: [Record(f"{path}: line {line}", row) for line, row in read(path, file)])
    if not records:
        raise UserError(f"{path}: the file has no records")
    return records


def _json_lines(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {line}: not valid JSON ({error.msg} at character {error.pos})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {line}: expected a JSON object, got {text.strip()[:60]}")
        yield line, row


def _delimited(delimiter: str) -> Callable[[Path, TextIO], Iterator[tuple[int, dict[str, Any]]]]:
    def read(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
        # files with tabs between columns, such as GLUE's, do not quote
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
        try:
            for row in rows:
                if None in row or None in row.values():
                    count = len(rows.fieldnames)
                    raise UserError(f"{path}: line {rows.line_num}: expected {count} columns, as in the first line")
                yield rows.line_num, row
        except csv.Error as error:
            raise UserError(f"{path}: line {rows.line_num}: {error}") from error

    return read


def _read(path: Path, use: Callable[[TextIO], Any]) -> Any:
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                return use(file)
        with open(path, encoding="utf-8-sig", newline="") as file:
            return use(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
