"""``python -m fdl``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    It is 0 where all went well, 2 after a user's mistake, 3 where an audit has found more than a run's account of
    privacy allows, and 128 and the number of the signal after one that asked to stop: 130 after Ctrl-C, 143 after
    SIGTERM.

    Args:
        argv: the arguments, by default those of the process.
    """
    from fdl.cli.main import run

    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return getattr(stop, "code", 130)
    except BrokenPipeError:
        # whoever read our output, such as head, has seen enough; Python must not complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
