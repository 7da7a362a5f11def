"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

PARTS = ("clients", "extraction", "encode", "decode", "aggregate", "distil", "evaluate", "checkpoint")
"""What a round consists of. ``clients`` is what their turns take beside the parts named apart: training, in the main;
``extraction`` is models answering; ``distil`` is all that the server does with what it has learnt."""

_PHASES = {"server": "distil", "audit": "evaluate"}


class Stopwatch(dict[str, float]):
    """Seconds by phase of the run, and of each part alone.

    Phases follow one upon the other; within them the clock may be handed to a part for a while (`part`).

    Attributes:
        parts: seconds by name among `PARTS`; together those of all phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._part: str | None = None
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the wall time of a block to a phase."""
        start = time.perf_counter()
        before = self._turn_to(_PHASES.get(phase, phase), start)
        try:
            yield
        finally:
            now = time.perf_counter()
            self._turn_to(before, now)
            self[phase] = self.get(phase, 0.0) + now - start

    def part(self, part: str, within: str = "") -> AbstractContextManager[None]:
        """Let a block count for a part, and not for the one that it interrupts.

        Args:
            part: its name.
            within: only where this part is being timed; "": anywhere within a phase.
        """
        return _NOTHING if self._part is None or (within and within != self._part) else _Part(self, part)

    def _turn_to(self, part: str | None, now: float) -> str | None:
        """Charge the part that was timed until now; returns it."""
        before = self._part
        if before is not None:
            self.parts[before] = self.parts.get(before, 0.0) + now - self._since
        self._part, self._since = part, now
        return before


class _Part:
    """What `Stopwatch.part` gives: a class, since a generator takes longer than a small message."""

    __slots__ = ("_before", "_clock", "_part")

    def __init__(self, clock: Stopwatch, part: str):
        self._clock, self._part = clock, part

    def __enter__(self) -> None:
        self._before = self._clock._turn_to(self._part, time.perf_counter())

    def __exit__(self, *error: object) -> None:
        self._clock._turn_to(self._before, time.perf_counter())


_NOTHING = nullcontext()
