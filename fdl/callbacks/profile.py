"""Profiler: the time of rounds, down to single operations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from fdl.callbacks.base import Callback
from fdl.errors import UserError
from fdl.utils.files import write_atomically

if TYPE_CHECKING:
    from fdl.federation.state import Federation

PROFILE_FILE = "profile.txt"


class Profile(Callback):
    """Records some rounds with torch's profiler; ``profile: true`` in a recipe adds it with its defaults.

    The trace is written to the run's ``tensorboard`` folder, for TensorBoard's profiler plugin and for any viewer of
    Chrome traces; ``profile.txt`` contains the time of all rounds by part and a table of the most expensive operations
    of the recorded rounds. Recording slows these rounds down, and its memory grows with the number of operations.

    Args:
        skip: rounds before the first recorded one, in which allocators and kernels warm up; if the run is too short,
            its last rounds are recorded.
        rounds: number of recorded rounds.
        top: number of operations in the table.

    Raises:
        UserError: a number is out of range.
    """

    name = "profile"
    optional = True

    def __init__(self, skip: int = 1, rounds: int = 1, top: int = 20):
        if skip < 0 or rounds < 1 or top < 1:
            raise UserError(f"expected skip ≥ 0, rounds ≥ 1 and top ≥ 1, got {skip}, {rounds} and {top}")
        self.skip, self.rounds, self.top = skip, rounds, top
        self._profiler: profile | None = None
        self._table = ""

    def on_fit_start(self, loop: Federation) -> None:
        """Start the profiler's schedule."""
        left = loop.rounds - loop.round
        active = min(self.rounds, left)
        if not active:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        handler = tensorboard_trace_handler(str(loop.folder / "tensorboard"), worker_name="round")
        sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

        def ready(profiler: profile) -> None:
            handler(profiler)
            self._table = profiler.key_averages().table(sort_by=sort, row_limit=self.top, max_name_column_width=60)

        waits = schedule(wait=min(self.skip, left - active), warmup=0, active=active, repeat=1)
        self._profiler = profile(activities=activities, schedule=waits, on_trace_ready=ready)
        self._profiler.start()

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Advance the profiler by one round."""
        if self._profiler is not None:
            self._profiler.step()

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Write profile.txt."""
        self._stop()
        text = f"{format_times(summary['time']['parts'])}\n\nOperations of the recorded rounds\n{self._table}\n"
        write_atomically(Path(loop.folder) / PROFILE_FILE, text.encode())

    def on_exception(self, loop: Federation, error: BaseException) -> None:
        """Stop the profiler; its recording is discarded."""
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def format_times(parts: dict[str, float]) -> str:
    """Format the time of all rounds by part as a plain table, with seconds and percentages.

    Args:
        parts: seconds by part.
    """
    total = sum(parts.values())
    rows = [f"{part:<12}{seconds:>10.3f} s{seconds / (total or 1):>8.1%}" for part, seconds in parts.items()]
    return "\n".join(["Time by part, all rounds", *rows, f"{'total':<12}{total:>10.3f} s"])
