"""Optional libraries."""

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
        extra: fdl's extra that installs it, e.g. ``"parquet"`` for ``pip install "fdl[parquet]"``.
        who: the component that needs the library; the error message begins with it.
        has: an attribute that the module must have, to detect a file or folder of the user's with the library's name.

    Raises:
        UserError: the library is not installed, or another module shadows it.
    """
    package = name.partition(".")[0]
    message = f'{who}: needs the library {package}; pip install "fdl[{extra}]"'
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        absent = (error.name or "").partition(".")[0] == package or sys.modules.get(package, error) is None
        reason = "" if absent else f" ({error})"  # a dependency of the installed library is missing
        raise UserError(f"{message}{reason}{_in_the_way(package)}") from error
    if has is not None and not hasattr(found, has):
        raise UserError(f"{message}{_in_the_way(package)}")
    return found


def _in_the_way(package: str) -> str:
    """Describe the file or folder that shadows a library; empty if none does."""
    module = sys.modules.get(package)
    file = getattr(module, "__file__", None)
    place = Path(file) if file else next(map(Path, getattr(module, "__path__", ())), None)
    if place is None or {"site-packages", "dist-packages"} & set(place.parts):
        return ""
    place = place.parent if place.name == "__init__.py" else place
    return f" ({place} has its name, and Python takes it for the library: rename it, or start fdl elsewhere)"
