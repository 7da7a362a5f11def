"""Where the command line writes."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, TextIO

from fdl.engine.distributed.launch_environment import is_follower

if TYPE_CHECKING:
    pass


def write_anything() -> None:
    """Let standard output and error replace letters that their encoding lacks, such as μ in Windows' cp1252."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def log_to_stderr() -> None:
    """Show what fdl logs on standard error; of others, warnings only."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        handler = _Stderr()
        handler.addFilter(lambda record: not record.name.startswith("lightning"))  # it has a handler of its own
        root.addHandler(handler)
    for chatty in ("lightning.fabric.utilities.distributed", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # which process is which
    logging.getLogger("fdl").setLevel(logging.WARNING if is_follower() else logging.INFO)


class _Stderr(logging.StreamHandler):
    """Looks `sys.stderr` up for every message, so that a live progress bar can put messages above itself."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """A stream handler sets this once; it is always looked up instead."""
