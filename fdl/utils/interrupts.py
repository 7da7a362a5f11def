"""Graceful shutdown on Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger("fdl")

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_STOPS_AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # if repeated; the others are sent by programs, some of them twice


class Interrupted(KeyboardInterrupt):
    """A run ended by a signal.

    Args:
        number: the signal's number.
        saved: True if the run can be resumed from where it ended; None if that is unknown.
    """

    def __init__(self, number: int = signal.SIGINT, saved: bool | None = None):
        super().__init__(signal.Signals(number).name)
        self.number, self.saved = number, saved

    @property
    def code(self) -> int:
        """The process's exit code by the convention of shells: 128 + signal, e.g. 130 for Ctrl-C."""
        return 128 + self.number


class GracefulShutdown:
    """Context manager that defers Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP to the end of the round.

    A second Ctrl-C or SIGTERM stops at once; the last checkpoint is then that of an earlier round. Signals that the
    process ignores already, e.g. SIGHUP under `nohup`, stay ignored. Outside the main thread, where Python cannot
    install signal handlers, nothing changes.

    Args:
        at_once: raise `Interrupted` at the first signal, for work that has no rounds.

    Attributes:
        requested: number of the first signal received; 0 if none was.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.requested = 0
        self._at_once = at_once
        self._seen: set[int] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not installed from Python
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self._at_once or (number in self._seen and number in _STOPS_AT_ONCE):
            raise Interrupted(number)
        self._seen.add(number)
        if self.requested:
            return
        self.requested = number
        log.warning(
            "%s: stopping after this round, once it is saved; Ctrl-C or SIGTERM again to stop at once",
            signal.Signals(number).name,
        )
