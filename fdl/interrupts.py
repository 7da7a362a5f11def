"""Ctrl-C and SIGTERM that lose nothing."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger("fdl")


class Interrupts:
    """Within this context the first Ctrl-C or SIGTERM is a request, to be honoured at the end of the round.

    A second one stops at once; the last checkpoint then is that of an earlier round. Outside the main thread, where
    Python cannot catch signals, nothing changes.

    Attributes:
        requested: whether someone asked to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        log.warning("%s: stopping after this round, once it is saved; again to stop at once", name)
