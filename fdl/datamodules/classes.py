"""From what a table calls classes to their numbers."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fdl.datamodules.records import Record
from fdl.errors import UserError

_MOST_UNUSED = 100
"""Numbers of classes may have gaps, since samples may be chosen; larger ones are codes of something else."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        key: key of a record's class.
        names: of the classes, in the order of their numbers.
        numbered: whether records have the number rather than the name.
    """

    key: str
    names: list[str]
    numbered: bool

    @classmethod
    def of(cls, splits: dict[str, list[Record]], key: str, names: Sequence[str] | None = None) -> Classes:
        """Find the classes of records.

        Args:
            splits: the records by split, with those of ``"train"``.
            key: key of their class.
            names: of the classes in order, where they are known.

        Raises:
            UserError: naming the record that has no class, or a score instead.
        """
        records = [record for split in splits.values() for record in split]
        values = [_value(record, key) for record in records]
        named = names is not None and {_name(record, key) for record in records} <= set(names)
        numbered = not named and all(isinstance(value, int) for value in values)
        if numbered:
            least = min(range(len(values)), key=values.__getitem__)
            if values[least] < 0:
                raise UserError(
                    f"{records[least].place}: {key!r} is {values[least]}, which stands for no class; leave out splits "
                    "without labels by setting splits"
                )
            top, kinds = max(values), len(set(values))
            if names is None and top > 2 * kinds + _MOST_UNUSED:
                raise UserError(f"{key!r}: {kinds} different classes, but numbers up to {top}; number them from 0")
            found = list(range(top + 1)) if names is None else list(names)
            if top >= len(found):
                place = records[values.index(top)].place
                raise UserError(f"{place}: {key!r} is {top}, but there are only {len(found)} classes")
        else:
            found = sorted({_name(record, key) for record in splits["train"]}) if names is None else list(names)
        return cls(key, [str(name) for name in found], numbered)

    def code(self, record: Record) -> int:
        """The number of a record's class.

        Raises:
            UserError: when it is none of the classes.
        """
        if self.numbered:
            return _value(record, self.key)
        name = _name(record, self.key)
        if name not in self._codes:
            raise UserError(f"{record.place}: class {name!r} is none of the classes of the training samples")
        return self._codes[name]

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.names)}


def _name(record: Record, key: str) -> str:
    return str(record[key]).strip()


def _value(record: Record, key: str) -> int | str:
    """A class as a number where it is one, else as a name."""
    value: Any = record[key]
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise UserError(f"{record.place}: {key!r} is an empty name of a class")
        return int(text) if text.lstrip("-").isdecimal() and text.isascii() else text
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, float):
        raise UserError(
            f"{record.place}: {key!r} is {value}, a score: regression is not supported, only classes (whole numbers "
            "or names)"
        )
    raise UserError(f"{record.place}: {key!r} must be the number or name of a class, got {value!r:.60}")
