"""From what data call classes to their numbers, in the same way whatever the format is.

Numbers are classes in their order: labels 1 and 5 are classes 0 and 1, named ``1`` and ``5``, which is logged.
Numbers that were written as 1.0, as pandas does after a missing value, are whole ones. What only a held-out sample
has is no class, be it a number or a name, unless the classes are listed.
"""

from __future__ import annotations

import logging
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np

from fdl.datamodules.records import Record
from fdl.errors import UserError

log = logging.getLogger("fdl")

_LIST_THEM = "; list all classes in classes to have some without training samples"
_WHOLE = re.compile(r"(-?\d+)(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", re.ASCII)
_FEW = 20
"""So few samples may well be of different classes each."""


@dataclass(frozen=True)
class Classes:
    """The classes of a table.

    Attributes:
        key: key of a record's class.
        names: of the classes, in the order of their numbers.
        numbers: which number in the table means each class; None where the table has the names.
    """

    key: str
    names: list[str]
    numbers: tuple[int, ...] | None

    @classmethod
    def of(cls, splits: dict[str, list[Record]], key: str, names: Sequence[str] | None = None) -> Classes:
        """Find the classes of records.

        Args:
            splits: the records by split, with those of ``"train"``.
            key: key of their class.
            names: of the classes in order, where they are known: numbers then count from 0 in this list.

        Raises:
            UserError: naming the record that has no class, or a score instead.
        """
        records = [record for split in splits.values() for record in split]
        values = [_value(record, key) for record in records]
        given = None if names is None else [str(name) for name in names]
        known = {_written(name) for name in given or ()}
        if given is not None and all(_written(record[key]) in known for record in records):
            return cls(key, given, None)
        switches = given is None and all(isinstance(value, bool) for value in values)
        if switches or any(isinstance(value, str) for value in values):
            found = sorted({_written(record[key]) for record in splits["train"]})
            _warn_of_identifiers(len(splits["train"]), len(found), repr(key))
            return cls(key, found if given is None else given, None)
        for record, value in zip(records, values):
            if isinstance(value, float):
                raise UserError(
                    f"{record.place}: {key!r} is {value:g}, a score: regression is not supported, only classes (whole "
                    "numbers or names)"
                )
            if value < 0:
                raise UserError(
                    f"{record.place}: {key!r} is {value}, which stands for no class; leave out splits without labels "
                    "by setting splits"
                )
            if given is not None and value >= len(given):
                raise UserError(
                    f"{record.place}: {key!r} is {value}, but there are only {len(given)} classes, and numbers count "
                    "from 0; where the numbers are names, list them in classes"
                )
        if given is not None:
            return cls(key, given, tuple(range(len(given))))
        train = np.array([_value(record, key) for record in splits["train"]], dtype=np.int64)
        order = class_numbers(train, repr(key)).tolist()
        return cls(key, [str(number) for number in order], tuple(order))

    def code(self, record: Record) -> int:
        """The number of a record's class.

        Raises:
            UserError: when it is none of the classes.
        """
        value = _written(record[self.key]) if self.numbers is None else _value(record, self.key)
        if value not in self._codes:
            raise UserError(
                f"{record.place}: class {value!r} is none of the classes of the training samples{_LIST_THEM}"
            )
        return self._codes[value]

    @cached_property
    def _codes(self) -> dict[str | int, int]:
        if self.numbers is not None:
            return {number: code for code, number in enumerate(self.numbers)}
        return {_written(name): code for code, name in enumerate(self.names)}


def whole_numbers(labels: np.ndarray, place: str) -> np.ndarray:
    """Labels as whole numbers, where that loses nothing.

    Args:
        labels: of any kind of number, or truth values, [n].
        place: what has these labels, for messages.

    Returns:
        int64 [n].

    Raises:
        UserError: one is not whole, or there are no numbers.
    """
    if labels.dtype.kind not in "biuf":
        raise UserError(f"{place}: labels must be whole numbers, got {labels.dtype}")
    whole = labels == np.floor(labels) if labels.dtype.kind == "f" else np.ones(labels.shape, dtype=bool)
    if not whole.all():
        raise UserError(
            f"{place}: {labels[~whole][0]:g} is no class: labels must be whole numbers (regression is not supported)"
        )
    return labels.astype(np.int64)


def class_numbers(train: np.ndarray, place: str) -> np.ndarray:
    """Derive the class numbers from the training samples, in order, for data without names of classes.

    Numbers that are not 0, 1, …, and numbers that look like identifiers, are logged.

    Args:
        train: labels of the training samples, int64 [n].
        place: what has these labels, for messages.

    Returns:
        The different numbers in ascending order, int64 [number of classes]; class i is the i-th of them.

    Raises:
        UserError: one is negative.
    """
    found = np.unique(train)
    if len(found) and found[0] < 0:
        raise UserError(f"{place}: {found[0]} is no class: labels must be ≥ 0")
    if len(found) and found[-1] != len(found) - 1:
        log.info("%s: the numbers %s are classes 0 … %d in this order", place, _some(found), len(found) - 1)
    _warn_of_identifiers(len(train), len(found), place)
    return found


def class_codes(labels: np.ndarray, found: np.ndarray, place: str) -> np.ndarray:
    """Numbers of classes as the model counts them.

    Args:
        labels: as in the data, int64 [n].
        found: from `class_numbers`, int64 [number of classes].
        place: what has these labels, for messages.

    Returns:
        Positions in `found`, int64 [n].

    Raises:
        UserError: one is none of them.
    """
    codes = np.searchsorted(found, labels)
    unknown = codes == len(found)
    unknown[~unknown] = found[codes[~unknown]] != labels[~unknown]
    if unknown.any():
        first = labels[unknown][0]
        raise UserError(f"{place}: class {first} is none of the classes of the training samples{_LIST_THEM}")
    return codes.astype(np.int64)


def _warn_of_identifiers(count: int, kinds: int, place: str) -> None:
    """Say that labels differ from sample to sample, as no classes do."""
    if count >= _FEW and 2 * kinds > count:
        log.warning(
            "%s has %d different values in %d training samples: these look like identifiers, not like classes",
            place,
            kinds,
            count,
        )


def _some(found: np.ndarray) -> str:
    words = [str(number) for number in found.tolist()]
    return ", ".join(words if len(words) <= 8 else [*words[:4], "…", words[-1]])


def _written(value: Any) -> str:
    """A class as a name; 1 and 1.0 are the same, 01 is not."""
    text = str(value).strip()
    found = _WHOLE.fullmatch(text)
    return found[1] if found and found[2] else text


def _value(record: Record, key: str) -> bool | int | float | str:
    """A class as a number or truth value where it is one, however that is written, else as a name."""
    value: Any = record[key]
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise UserError(f"{record.place}: {key!r} is an empty name of a class")
        if text in ("True", "False"):
            return text == "True"
        if not _NUMBER.fullmatch(text):
            return text
        value = Decimal(text)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if not isinstance(value, numbers.Real | Decimal):
        raise UserError(f"{record.place}: {key!r} must be the number or name of a class, got {value!r:.60}")
    if not math.isfinite(value):
        raise UserError(f"{record.place}: {key!r} is {value}, which stands for no class")
    return int(value) if value == int(value) else float(value)
