"""How far the run is, for whoever watches the terminal."""

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
    """Shows rounds, the clients within a round, the student's accuracy and the bytes so far.

    On a terminal it is a live bar, elsewhere (a pipe, a log of a batch system) one plain line a round. An output that
    is closed or breaks ends the display, never the run.
    """

    name = "progress"
    optional = True

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._seconds = 0.0

    def on_fit_start(self, loop: Federation) -> None:
        """Begin the display, after a resume where the run goes on."""
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
        """Set the bar of clients back."""
        if self._bar is not None:
            cohort, dropped = loop.cohort(round)
            self._bar.reset(self._clients, total=len(cohort) - len(dropped), visible=True, status="")

    def on_client_end(self, loop: Federation, round: int, client: int, metrics: dict[str, float]) -> None:
        """Move the bar of clients on."""
        if self._bar is not None:
            self._bar.advance(self._clients)
            if self._bar.tasks[1].finished:
                self._bar.update(self._clients, status="the server learns")

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Move the bar of rounds on, or print the round's line."""
        if self._bar is not None:
            self._bar.update(self._rounds, completed=record["round"], status=_status(record, self._brief))
            return
        seconds, self._seconds = _seconds(record) - self._seconds, _seconds(record)
        self._stream.write(f"round {record['round']}/{loop.rounds}  {_status(record)}  {seconds:.1f} s\n")
        self._stream.flush()

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Leave the last state of the bar on the screen."""
        self._stop()

    def on_exception(self, loop: Federation, error: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.remove_task(self._clients)
            self._bar.stop()
            self._bar = None


class PipeSafeStream:
    """A text stream that goes silent, instead of raising, once nobody can read it.

    Args:
        stream: where to write; None, as where a process has no standard output, is silent from the start.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write text if it can be written."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush if there is anybody to flush to."""
        self._try("flush")

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return bool(self._try("isatty"))

    def _try(self, method: str, *arguments: str) -> Any:
        if self._stream is None:
            return None
        try:
            return getattr(self._stream, method)(*arguments)
        except BrokenPipeError:
            # what is buffered would raise once more when Python flushes at exit; as its documentation advises, the
            # descriptor is pointed at nothing
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())
        except (OSError, ValueError):  # ValueError is what a closed file raises
            pass
        self._stream = None
        return None


_WIDE = 120
"""Letters of a terminal on which all there is to say of a round stands beside the bar."""


def _status(record: Mapping[str, Any], brief: bool = False) -> str:
    """The round's outcome in a few words, e.g. ``student 0.912  specialists 0.654  up 12.3 kB  down 4.1 kB``.

    Args:
        record: of the round.
        brief: only the first score, and all bytes in one, e.g. ``student 0.912  16.4 kB``.
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
