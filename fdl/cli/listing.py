"""Output of ``fdl list``."""

from __future__ import annotations

import ast
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fdl.errors import UserError
from fdl.metrics.tasks import TASKS
from fdl.recipe.config import Recipe
from fdl.recipe.validate import keys
from fdl.registry.checking import describe
from fdl.registry.component import Component
from fdl.registry.kinds import KINDS, Kind
from fdl.registry.plugins import PluginInfo, entries, problems, short_names
from fdl.registry.static_signatures import argument_docs
from fdl.registry.targets import find
from fdl.utils.suggest import suggest

SECTIONS = (*(kind.plural for kind in KINDS.values()), "metrics", "recipes", "keys")
"""Names of the lists."""

_LEAST_TEXT = 40


def page(words: Sequence[str]) -> str:
    """Format the output of ``fdl list`` for the given words.

    Args:
        words: empty for all lists; the name of a list, singular or plural; the name of a plug-in, for its arguments; or
            both.

    Raises:
        UserError: a name is unknown; the message contains the nearest.
    """
    if not words:
        broken = problems()
        notes = ["not offered", *(f"  {line}" for line in broken), ""] if broken else []
        return "\n".join([*(section(name, title=True) for name in SECTIONS), *notes])
    if len(words) > 2:
        raise UserError(f"fdl list {' '.join(words)}: expected at most a kind and a name, such as fdl list module timm")
    listed = _section_of(words[0])
    if len(words) == 1:
        return section(listed) if listed else _plugin(words[0], list(KINDS.values()))
    kind = next((kind for kind in KINDS.values() if kind.plural == listed), None)
    if kind is None:
        raise UserError(f"fdl list {' '.join(words)}: {words[0]!r} is no kind of plug-in; {_known(words[0])}")
    return _plugin(words[1], [kind])


def section(name: str, title: bool = False) -> str:
    """Format one list: the plug-ins of a kind, the metrics, the recipes in ``./recipes``, or all keys of a recipe.

    Args:
        name: one of `SECTIONS`.
        title: True to put the name above the list.
    """
    rows = {"recipes": _recipes, "keys": _keys, "metrics": _metrics}.get(name, lambda: _plugins(name))()
    if not rows:
        rows = [("none",)]
    width = _width()
    lines = format_rows(rows, width - 2 if title and width else width)
    return f"{name}\n" + "\n".join(f"  {line}".rstrip() for line in lines) + "\n" if title else "\n".join(lines)


def format_rows(rows: Sequence[Sequence[object]], width: int | None) -> list[str]:
    """Format rows as aligned columns if these fit, or else as the first column with all others as wrapped text.

    Args:
        rows: cells by row.
        width: maximum width of a line in characters; None for no limit.

    Returns:
        The lines.
    """
    lines = align_columns(rows)
    if width is None or max(map(len, lines)) <= width:
        return lines
    first = min(max(len(str(row[0])) for row in rows), max(width - _LEAST_TEXT, 8)) + 2
    lines = []
    for head, *rest in rows:
        text = "  ".join(str(cell) for cell in rest if str(cell))
        wrapped = textwrap.wrap(text, max(width - first, 10), break_on_hyphens=False) or [""]
        start = str(head)
        if len(start) + 2 > first:
            lines.append(start)
            start = ""
        lines += [f"{begin:<{first}}{line}".rstrip() for begin, line in zip([start, *[""] * len(wrapped)], wrapped)]
    return lines


def align_columns(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> list[str]:
    """Format rows as aligned columns.

    Args:
        rows: cells by row.
        right: indices of the columns to align to the right.

    Returns:
        The lines.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts if i < len(row)) for i in range(max(map(len, texts)))]
    return [
        "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in texts
    ]


def _width() -> int | None:
    """Return the width of the terminal in characters; None if output does not go to a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _section_of(word: str) -> str | None:
    """Return the section named by a word, singular or plural; None for other words."""
    word = word.lower().replace("-", "_")
    singular = {kind.name: kind.plural for kind in KINDS.values()}
    singular |= {"metric": "metrics", "recipe": "recipes", "key": "keys"}
    found = singular.get(word, word)
    return found if found in SECTIONS else None


def _known(word: str) -> str:
    near = "" if _section_of(word) else suggest(word, SECTIONS, few=0).removeprefix("; ")
    return f"{near + ' ' if near else ''}fdl list takes {', '.join(SECTIONS)}, or the name of a plug-in"


def _plugin(name: str, kinds: Sequence[Kind]) -> str:
    """Describe all plug-ins with a name: summary, definition and arguments."""
    found = [(kind, entry) for kind in kinds for entry in entries(kind) if entry.name == name]
    if found:
        return "\n\n".join(_describe_plugin(kind, entry) for kind, entry in found)
    if len(kinds) == 1:
        raise UserError(f"there is no {kinds[0].label} {name!r}{suggest(name, short_names(kinds[0]), few=99)}")
    near = suggest(name, {*SECTIONS, *(n for kind in kinds for n in short_names(kind))}, few=0)
    raise UserError(f"fdl list: nothing is called {name!r}{near or '; ' + _known(name)}")


def _describe_plugin(kind: Kind, entry: PluginInfo) -> str:
    """Describe one plug-in with its arguments: name, type and default, meaning."""
    lines = [f"{entry.name}, {kind}: {entry.summary}", f"{entry.path}, {_place(entry)}"]
    target = find(entry.name, kind)
    taken = target.signature.parameters if target.signature is not None else {}
    docs = argument_docs(target.definition) if target.definition is not None else {}
    rows = []
    for name, parameter in sorted(taken.items(), key=lambda item: not item[1].required):
        if name not in (*kind.forbidden, *kind.injected):
            typed = "" if parameter.annotation is None else describe(parameter.annotation)
            default = "" if parameter.default is None else f"default {_default_text(parameter.default)}"
            need = "needed" if parameter.required else ""
            rows.append((name, ", ".join(filter(None, (typed, need, default))), docs.get(name, "")))
    if not rows:
        return "\n".join([*lines, "", "takes no args"])
    return "\n".join([*lines, "", "args", *(f"  {line}".rstrip() for line in format_rows(rows, (_width() or 122) - 2))])


def _default_text(default: ast.expr) -> str:
    text = ast.unparse(default)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _metrics() -> list[tuple[str, str]]:
    """Return names of metrics with the tasks that they apply to."""
    tasks: dict[str, list[str]] = {}
    for task in TASKS.values():
        for name in task.metrics:
            tasks.setdefault(name, []).append(task.name + " (by default)" * (name in task.default))
    return [(name, ", ".join(own)) for name, own in sorted(tasks.items())]


def _plugins(name: str) -> list[tuple[str, str, str]]:
    kind = next(kind for kind in KINDS.values() if kind.plural == name)
    return [(e.name, e.summary, _place(e)) for e in entries(kind)]


def _recipes() -> list[tuple[str, str]]:
    """Return recipe files with their first comment line."""
    rows = []
    for path in sorted(Path("recipes").rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        rows.append((str(path), first.lstrip("# ") if first.startswith("#") else ""))
    return rows


def _keys() -> list[tuple[str, str, str, str]]:
    """Return all recipe keys with defaults, meanings and types."""
    return [(path, _default(default), doc, kind) for path, kind, default, doc in keys(Recipe)]


def _default(value: object) -> str:
    if isinstance(value, Component):
        return "" if value.target == "???" else value.target
    if isinstance(value, list):
        return f"[{', '.join(map(_default, value))}]"
    return "" if value is None or value in ("", {}) else str(value)


def _place(entry: PluginInfo) -> str:
    """Return the file and line of a plug-in's definition, and the installed package that provides it."""
    return f"{_short(entry.file)}:{entry.line}" + (f" ({entry.distribution})" if entry.distribution else "")


def _short(file: Path) -> str:
    """Shorten a path: relative to the working directory, to fdl's folder or to site-packages, if it lies below one."""
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if file.is_relative_to(root):
            return str(file.relative_to(root))
    parts = file.parts
    return str(Path(*parts[parts.index("site-packages") + 1 :])) if "site-packages" in parts else str(file)
