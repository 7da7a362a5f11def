"""Libraries that fdl needs for some things only."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from fdl.errors import UserError


def library(name: str, extra: str, who: str, has: str | None = None) -> ModuleType:
    """Import an optional library.

    Args:
        name: dotted name of the module.
        extra: what to install with fdl to get it, e.g. ``"parquet"`` for ``pip install "fdl[parquet]"``.
        who: what needs it, to begin a message with.
        has: a name that the module must have: a folder or file of one's own may be called as the library is, and Python
            takes it for the library.

    Raises:
        UserError: it is not installed, or something else is in its place.
    """
    package = name.partition(".")[0]
    message = f'{who}: needs the library {package}; pip install "fdl[{extra}]"'
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        absent = (error.name or "").partition(".")[0] == package or sys.modules.get(package, error) is None
        reason = "" if absent else f" ({error})"  # something that an installed library itself needs
        raise UserError(f"{message}{reason}{_in_the_way(package)}") from error
    if has is not None and not hasattr(found, has):
        raise UserError(f"{message}{_in_the_way(package)}")
    return found


def _in_the_way(package: str) -> str:
    """Where what was imported instead of a library lies, if that is in no folder of installed packages."""
    module = sys.modules.get(package)
    file = getattr(module, "__file__", None)
    place = Path(file) if file else next(map(Path, getattr(module, "__path__", ())), None)
    if place is None or {"site-packages", "dist-packages"} & set(place.parts):
        return ""
    place = place.parent if place.name == "__init__.py" else place
    return f" ({place} has its name, and Python takes it for the library: rename it, or start fdl elsewhere)"
