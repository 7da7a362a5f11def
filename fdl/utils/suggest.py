"""Suggestions for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str], few: int = 15) -> str:
    """Complete an error message with the nearest known word: ``"; did you mean 'x'?"``.

    Args:
        word: the unknown word.
        known: the words allowed.
        few: if no known word is near, all of them are listed, provided that there are at most this many.

    Returns:
        The end of a message; empty if there is nothing to suggest.

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
