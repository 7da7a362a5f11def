"""Signals that end a run without losing anything: Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger("fdl")

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_AGAIN = (signal.SIGINT, signal.SIGTERM)  # the others come from programs, some of which say everything twice


class Interrupted(KeyboardInterrupt):
    """Somebody has asked the run to end.

    Args:
        number: the signal.
        saved: whether the run can go on from where it ended; None where that is not known.
    """

    def __init__(self, number: int = signal.SIGINT, saved: bool | None = None):
        super().__init__(signal.Signals(number).name)
        self.number, self.saved = number, saved

    @property
    def code(self) -> int:
        """The exit code of a process that ends for it, as shells count: 130 for Ctrl-C, 138 for SIGUSR1."""
        return 128 + self.number


class GracefulShutdown:
    """Within this context the first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP is a request, honoured at the end of the round.

    A second Ctrl-C or SIGTERM stops at once; the last checkpoint then is that of an earlier round. Signals that this
    process was told to ignore, as `nohup` does with SIGHUP, stay ignored. Outside the main thread, where Python cannot
    catch signals, nothing changes.

    Args:
        at_once: stop at the first signal, where there are no rounds.

    Attributes:
        requested: the number of the signal by which somebody asked to stop; 0 where nobody did.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.requested = 0
        self._at_once = at_once
        self._seen: set[int] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: somebody's that Python cannot see
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self._at_once or (number in self._seen and number in _AGAIN):
            raise Interrupted(number)
        self._seen.add(number)
        if self.requested:
            return
        self.requested = number
        log.warning(
            "%s: stopping after this round, once it is saved; Ctrl-C or SIGTERM again to stop at once",
            signal.Signals(number).name,
        )
