"""Standard output, standard error and logging of the command line."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from fdl.engine.distributed.launch_environment import is_follower


def replace_unencodable() -> None:
    """Make standard output and error replace characters that their encoding lacks, e.g. μ in Windows' cp1252."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def log_to_stderr() -> None:
    """Write fdl's log messages to standard error; only warnings of other libraries."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        handler = _Stderr()
        handler.addFilter(lambda record: not record.name.startswith("lightning"))  # Lightning has its own handler
        root.addHandler(handler)
    for chatty in ("lightning.fabric.utilities.distributed", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # they log the rank of every process
    logging.getLogger("fdl").setLevel(logging.WARNING if is_follower() else logging.INFO)


class _Stderr(logging.StreamHandler):
    """Handler that looks up `sys.stderr` for every message, so that a live progress bar can print messages above it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Ignore the stream that `StreamHandler` sets in its constructor."""
