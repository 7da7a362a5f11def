"""What ``fdl list`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fdl.catalog import KINDS, entries
from fdl.recipe import Recipe
from fdl.schema import Component, keys


def section(name: str, title: bool = False) -> str:
    """The plug-ins of one kind, the recipes in ``./recipes``, or all keys of a recipe.

    Args:
        name: a kind in the plural, ``"recipes"`` or ``"keys"``.
        title: whether the name stands above.
    """
    rows = {"recipes": _recipes, "keys": _keys}.get(name, lambda: _plugins(name))()
    if not rows:
        rows = [("none",)]
    lines = columns(rows)
    return f"{name}\n" + "\n".join(f"  {line}".rstrip() for line in lines) + "\n" if title else "\n".join(lines)


def columns(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> list[str]:
    """Lines of aligned columns.

    Args:
        rows: cells by row.
        right: numbers of the columns that are aligned to the right.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts if i < len(row)) for i in range(max(map(len, texts)))]
    return [
        "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in texts
    ]


def _plugins(name: str) -> list[tuple[str, str, str]]:
    kind = next(kind for kind in KINDS.values() if kind.plural == name)
    return [(e.name, e.summary, f"{_short(e.file)}:{e.line}") for e in entries(kind)]


def _recipes() -> list[tuple[str, str]]:
    """Recipe files and their first comment line."""
    rows = []
    for path in sorted(Path("recipes").rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        rows.append((str(path), first.lstrip("# ") if first.startswith("#") else ""))
    return rows


def _keys() -> list[tuple[str, str, str, str]]:
    """Keys, defaults, meanings and types."""
    return [(path, _default(default), doc, kind) for path, kind, default, doc in keys(Recipe)]


def _default(value: object) -> str:
    if isinstance(value, Component):
        return "" if value.target == "???" else value.target
    if isinstance(value, list):
        return f"[{', '.join(map(_default, value))}]"
    return "" if value is None or value in ("", {}) else str(value)


def _short(file: Path) -> str:
    """A path from here where that is shorter, else from the folder of packages."""
    for root in (Path.cwd(), Path(__file__).parents[1]):
        if file.is_relative_to(root):
            return str(file.relative_to(root))
    parts = file.parts
    return str(Path(*parts[parts.index("site-packages") + 1 :])) if "site-packages" in parts else str(file)
