"""Suggestions for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str], few: int = 15) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, or all known words where there are few.

    Args:
        word: what was written.
        known: what would have been right.
        few: up to how many words are listed when none is near.

    Example:
        >>> suggest("fedavgg", ["fedavg", "feddf", "fedprox"])
        "; did you mean 'fedavg'?"
        >>> suggest("x", ["fedavg", "feddf"])
        '; known: fedavg, feddf'
    """
    known = sorted(known)
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(word.lower(), lower, n=1)
    if near:
        return f"; did you mean {lower.get(near[0], near[0])!r}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= few else ""
