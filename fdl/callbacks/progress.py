"""Progress of a run on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fdl.callbacks.base import Callback
from fdl.metrics.tasks import TASKS

if TYPE_CHECKING:
    from fdl.federation.state import Federation


class ProgressBar(Callback):
    """Shows rounds, the clients within a round, the scores and the cumulative bytes.

    The display is a live bar on a terminal, and elsewhere (a pipe, the log of a batch system) one plain line per round.
    A closed or broken output ends the display, never the run.
    """

    name = "progress"
    optional = True

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._seconds = 0.0

    def on_fit_start(self, loop: Federation) -> None:
        """Start the display; in a resumed run, at the round where it continues."""
        self._stream = PipeSafeStream(sys.stdout)
        self._seconds = _seconds(loop.history[-1]) if loop.history else 0.0
        console = Console(file=self._stream)
        if not console.is_terminal or console.is_dumb_terminal:
            return
        self._brief = console.width < _WIDE
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10 if self._brief else 40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, refresh_per_second=4)
        status = _status(loop.history[-1], self._brief) if loop.history else ""
        self._rounds = self._bar.add_task("rounds", total=loop.rounds, completed=loop.round, status=status)
        self._clients = self._bar.add_task("clients", total=None, status="", visible=False)
        self._bar.start()

    def on_round_start(self, loop: Federation, round: int) -> None:
        """Reset the bar of clients."""
        if self._bar is not None:
            cohort, dropped = loop.cohort(round)
            self._bar.reset(self._clients, total=len(cohort) - len(dropped), visible=True, status="")

    def on_client_end(self, loop: Federation, round: int, client: int, metrics: dict[str, float]) -> None:
        """Advance the bar of clients."""
        if self._bar is not None:
            self._bar.advance(self._clients)
            if self._bar.tasks[1].finished:
                self._bar.update(self._clients, status="server update")

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Move the bar of rounds on, or print the round's line."""
        if self._bar is not None:
            self._bar.update(self._rounds, completed=record["round"], status=_status(record, self._brief))
            return
        seconds, self._seconds = _seconds(record) - self._seconds, _seconds(record)
        self._stream.write(f"round {record['round']}/{loop.rounds}  {_status(record)}  {seconds:.1f} s\n")
        self._stream.flush()

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Stop the bar, and leave its last state on the screen."""
        self._stop()

    def on_exception(self, loop: Federation, error: BaseException) -> None:
        """Release the terminal."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.remove_task(self._clients)
            self._bar.stop()
            self._bar = None


class PipeSafeStream:
    """Text stream that discards output, instead of raising, once its reader is gone.

    Args:
        stream: the stream to write to; None, as in processes without standard output, discards all output.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write text if the stream is still open.

        Args:
            text: the text.

        Returns:
            The length of the text.
        """
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if it is still open."""
        self._try("flush")

    def isatty(self) -> bool:
        """Return True if the stream is a terminal."""
        return bool(self._try("isatty"))

    def _try(self, method: str, *arguments: str) -> Any:
        if self._stream is None:
            return None
        try:
            return getattr(self._stream, method)(*arguments)
        except BrokenPipeError:
            # buffered text would raise again when Python flushes at exit; as its documentation advises, the
            # descriptor is redirected to the null device
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())
        except (OSError, ValueError):  # a closed file raises ValueError
            pass
        self._stream = None
        return None


_WIDE = 120
"""Width in characters from which on the full status of a round fits next to the bar."""


def _status(record: Mapping[str, Any], brief: bool = False) -> str:
    """Format a round's outcome, e.g. ``student 0.912  specialists 0.654  up 12.3 kB  down 4.1 kB``.

    Args:
        record: the round's record.
        brief: only the first score, and the sum of all bytes, e.g. ``student 0.912  16.4 kB``.
    """
    metrics, sent = record["metrics"], record["communication"]
    score = next((t.score for t in TASKS.values() if any(key.endswith(f"/test/{t.score}") for key in metrics)), "")
    names = {owner: f"{owner}/test/{score}" for owner in ("student", "specialists")}
    words = [f"{name} {metrics[key]:.3f}" for name, key in names.items() if key in metrics]
    if brief:
        words = [*words[:1], decimal(sent["upload_bytes"] + sent["download_bytes"])]
    else:
        words += [f"up {decimal(sent['upload_bytes'])}", f"down {decimal(sent['download_bytes'])}"]
    if record["refused"]:
        words.append(f"refused {len(record['refused'])}")
    return "  ".join(words)


def _seconds(record: Mapping[str, Any]) -> float:
    return sum(record["seconds"].values())
