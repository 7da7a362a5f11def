"""Records, and texts of files, with messages that name file and line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdl.datamodules.decoding import read_decoded
from fdl.errors import MissingPathError, UserError
from fdl.utils.paths import expanded

SKIP = "; set skip_empty: true to leave such ones out"
"""Advice on empty texts, for data modules that have this argument."""

TEXTS = (".txt", ".md", ".txt.gz", ".md.gz")
"""Suffixes of plain-text files."""

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
        """Test that every key of `where` has its value here, or one of its list of values."""
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
    """A path that the user gave, as `fdl.utils.paths.expanded` reads it.

    Raises:
        UserError: when there is nothing.
    """
    found = expanded(path)
    try:
        there = found.exists()
    except OSError as error:  # such as a name that is too long for any file
        raise UserError(f"{found}: cannot be read ({error.strerror})") from error
    if not there:
        raise MissingPathError(found)
    return found


def ends_with(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Test for a file with one of the given suffixes, in any case."""
    return path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(suffixes)


def stem(path: Path) -> str:
    """Return the file name without the suffixes of format and compression."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name.rpartition(".")[0].removesuffix(".snappy") or name


def read_text(path: Path, encoding: str | None = None) -> str:
    """The whole text of a file, unpacked where it ends in .gz; line ends are left as they are.

    Args:
        path: the file.
        encoding: as in `read_decoded`.

    Raises:
        UserError: when it cannot be read, is of another encoding, or empty.
    """
    text = read_decoded(path, lambda file: file.read(), encoding)
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text
