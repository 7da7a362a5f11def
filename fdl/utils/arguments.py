"""Validation of constructor arguments. Each check returns the value, so that it can be used in an assignment."""

from __future__ import annotations

import math
from collections.abc import Collection

from fdl.errors import UserError


def positive(name: str, value: float) -> float:
    """Require a finite number > 0, and return it as a float.

    Args:
        name: the argument's name, for the error message.
        value: the number to check.

    Raises:
        UserError: `value` is not a finite number > 0.

    Example:
        >>> positive("lr", 0.1)
        0.1
    """
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be a number > 0, got {value}")
    return float(value)


def at_least(name: str, value: int, least: int) -> int:
    """Require a whole number of at least `least`, and return it.

    Args:
        name: the argument's name, for the error message.
        value: the number to check.
        least: the smallest number allowed.

    Raises:
        UserError: `value` is below `least`.
    """
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """Require a finite number ≥ 0, and return it as a float.

    Args:
        name: the argument's name, for the error message.
        value: the number to check.

    Raises:
        UserError: `value` is not a finite number ≥ 0.
    """
    if not 0 <= value < math.inf:
        raise UserError(f"{name} must be a number ≥ 0, got {value}")
    return float(value)


def one_of(name: str, value: str, known: Collection[str]) -> str:
    """Require one of the known values, and return it.

    Args:
        name: the argument's name, for the error message.
        value: the value to check.
        known: the values allowed, in the order in which the error lists them.

    Raises:
        UserError: `value` is not among `known`.

    Example:
        >>> one_of("scale", "row", ("row", "tensor"))
        'row'
    """
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value
