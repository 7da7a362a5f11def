"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch(dict[str, float]):
    """Seconds by part of the run."""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the wall time of a block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[part] = self.get(part, 0.0) + time.perf_counter() - start
