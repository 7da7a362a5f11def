"""Expansion of paths, without importing torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fdl.errors import UserError

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


def expanded(path: str | Path) -> Path:
    """Expand ``~``, ``$NAME`` and ``${NAME}`` in a path as a shell does.

    Args:
        path: e.g. ``"~/runs"`` or ``"$SCRATCH/runs"``.

    Raises:
        UserError: a variable is not set, or the user of ``~user`` does not exist.

    Example:
        >>> expanded("~/runs") == Path.home() / "runs"
        True
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{path}: the environment variable {name} is not set")
        return os.environ[name]

    try:
        return Path(_VARIABLE.sub(value, str(path))).expanduser()
    except RuntimeError as error:  # raised by expanduser
        raise UserError(f"{path}: {str(error)[:1].lower()}{str(error)[1:].rstrip('.')}") from error
