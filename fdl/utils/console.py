"""Console output: width and colours."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


_WIDE = 160


def console() -> Console:
    """Create a console on standard output, as wide as the terminal, or 160 columns when output is redirected."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDE)
