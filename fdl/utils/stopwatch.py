"""Timing of a run by phase and part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

PARTS = ("clients", "extraction", "encode", "decode", "aggregate", "distil", "evaluate", "checkpoint")
"""Parts of a round. ``clients`` is local training and everything else in local updates that has no part of its own;
``extraction`` is inference; ``distil`` is the server update."""

_PHASES = {"server": "distil", "audit": "evaluate"}


class Stopwatch(dict[str, float]):
    """Wall time in seconds by phase of the run, and by part.

    Phases do not overlap. Within a phase, `part` attributes the time of a block to another part.

    Attributes:
        parts: seconds by part (see `PARTS`); their sum is that of all phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._part: str | None = None
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the wall time of a block to a phase.

        Args:
            phase: the phase's name.
        """
        start = time.perf_counter()
        before = self._turn_to(_PHASES.get(phase, phase), start)
        try:
            yield
        finally:
            now = time.perf_counter()
            self._turn_to(before, now)
            self[phase] = self.get(phase, 0.0) + now - start

    def part(self, part: str, within: str = "") -> AbstractContextManager[None]:
        """Attribute the wall time of a block to a part, instead of to the part that it interrupts.

        Args:
            part: the part's name.
            within: do so only if this part is being timed; "": always, within a phase.
        """
        return _NOTHING if self._part is None or (within and within != self._part) else _Part(self, part)

    def _turn_to(self, part: str | None, now: float) -> str | None:
        """Add the time until `now` to the part being timed, start timing `part`, and return the former."""
        before = self._part
        if before is not None:
            self.parts[before] = self.parts.get(before, 0.0) + now - self._since
        self._part, self._since = part, now
        return before


class _Part:
    """Context of `Stopwatch.part`; a class, because a generator would cost more than encoding a small message."""

    __slots__ = ("_before", "_clock", "_part")

    def __init__(self, clock: Stopwatch, part: str):
        self._clock, self._part = clock, part

    def __enter__(self) -> None:
        self._before = self._clock._turn_to(self._part, time.perf_counter())

    def __exit__(self, *error: object) -> None:
        self._clock._turn_to(self._before, time.perf_counter())


_NOTHING = nullcontext()
