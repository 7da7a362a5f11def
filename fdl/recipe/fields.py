"""Fields of a recipe's sections: meanings and bounds."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from fdl.recipe.validate import _copy


class Bounds(typing.NamedTuple):
    """An interval for a number.

    Attributes:
        low: lower end.
        high: upper end; None for an unbounded interval.
        open_low: True if the lower end is excluded.
        open_high: True if the upper end is excluded.
    """

    low: float
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (self.high is None or (value < self.high if self.open_high else value <= self.high))

    def __str__(self) -> str:
        if self.high is None:
            return f"{'>' if self.open_low else '≥'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def key(default: Any, doc: str, kind: str | None = None, bounds: Bounds | None = None) -> Any:
    """Create a dataclass field with its help text.

    Args:
        default: the default; a list, dict or dataclass instance is copied for each use.
        doc: one line of help.
        kind: for components, the kind of plug-in.
        bounds: for numbers, the interval of allowed values.
    """
    metadata = {"doc": doc, "kind": kind, "bounds": bounds}
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_COUNT = Bounds(1)
