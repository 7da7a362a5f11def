"""A plug-in as a recipe names it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Component:
    """A plug-in: what it is and its arguments. Components are equal, and keys of caches, by value."""

    target: str = "???"
    args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:
        """By value, of nested mappings and lists too."""
        return hash(tuple(hashable(getattr(self, field.name)) for field in dataclasses.fields(self)))


def hashable(value: Any) -> Any:
    """A hashable form of a recipe's value; equal values have equal forms."""
    if isinstance(value, dict):
        return frozenset((name, hashable(one)) for name, one in value.items())
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value
