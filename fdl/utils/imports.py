"""Imports by dotted path."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from fdl.errors import UserError
from fdl.utils.suggest import suggest


def import_dotted(path: str) -> Any:
    """Import the object at a dotted path.

    Args:
        path: module and attribute, e.g. ``"mypackage.models.Net"``.

    Raises:
        UserError: a part of the path does not exist (with the nearest name), or importing a module fails.
    """
    parts = path.split(".")
    found: Any = None
    for i, part in enumerate(parts):
        prefix = ".".join(parts[: i + 1])
        if i and hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(prefix)
        except ModuleNotFoundError as error:
            if error.name and not f"{prefix}.".startswith(f"{error.name}."):
                raise UserError(f"{path}: importing {prefix} failed: {error}") from error
            if i == 0:
                raise UserError(f"{path}: there is no module {part!r}{_near_package(part)}") from None
            where = ".".join(parts[:i])
            raise UserError(f"{path}: {where} has no {part!r}{suggest(part, dir(found), few=0)}") from None
        except (ImportError, SyntaxError) as error:
            raise UserError(f"{path}: importing {prefix} failed: {error}") from error
    return found


def _near_package(name: str) -> str:
    """Suggest a module of the working directory with a similar name; empty if there is none."""
    here = [p.stem for p in Path().glob("*.py")] + [p.parent.name for p in Path().glob("*/__init__.py")]
    return suggest(name, here, few=0)
