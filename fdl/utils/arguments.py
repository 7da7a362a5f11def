"""Checks of constructors' arguments."""

from __future__ import annotations

import math
from collections.abc import Collection

from fdl.errors import UserError


def positive(name: str, value: float) -> float:
    """The value.

    Raises:
        UserError: it is not a finite number above 0.

    Example:
        >>> positive("lr", 0.1)
        0.1
    """
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be a number > 0, got {value}")
    return float(value)


def at_least(name: str, value: int, least: int) -> int:
    """The value.

    Raises:
        UserError: it is below the least.
    """
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """The value.

    Raises:
        UserError: it is not a finite number from 0.
    """
    if not 0 <= value < math.inf:
        raise UserError(f"{name} must be a number ≥ 0, got {value}")
    return float(value)


def one_of(name: str, value: str, known: Collection[str]) -> str:
    """The value.

    Raises:
        UserError: it is not among the known ones.

    Example:
        >>> one_of("scale", "row", ("row", "tensor"))
        'row'
    """
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value
