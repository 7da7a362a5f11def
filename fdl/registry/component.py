"""A component: a plug-in and its arguments, in the form of a recipe."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Component:
    """A plug-in and its arguments, compared and hashed by value.

    Attributes:
        target: short name or dotted path; ``"???"`` if the recipe must give one.
        args: arguments of the constructor.
    """

    target: str = "???"
    args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:
        """Hash by value, including nested mappings and lists."""
        return hash(tuple(hashable(getattr(self, field.name)) for field in dataclasses.fields(self)))


def hashable(value: Any) -> Any:
    """Convert a recipe's value to a hashable form; equal values have equal forms.

    Args:
        value: a scalar, or nested mappings and lists.
    """
    if isinstance(value, dict):
        return frozenset((name, hashable(one)) for name, one in value.items())
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value
