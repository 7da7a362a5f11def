"""Short names of plug-ins: of fdl's own, and of those that installed packages bring along."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fdl.registry.kinds import Kind
from fdl.registry.static_signatures import signature
from fdl.registry.static_source import Definition, SourceModule, ancestors, derives, lookup, member


@dataclass(frozen=True)
class PluginInfo:
    """A built-in plug-in, as ``fdl list`` prints it.

    Attributes:
        name: its short name.
        path: its dotted path.
        summary: one line on what it is.
        file: where it is defined.
        line: and on which line.
    """

    name: str
    path: str
    summary: str
    file: Path
    line: int


def entries(kind: Kind) -> list[PluginInfo]:
    """All built-in plug-ins of a kind, by name."""
    found = []
    for name, path in sorted(short_names(kind).items()):
        definition = lookup(path)
        if isinstance(definition, Definition) and not missing_in_call(definition, kind):
            node = definition.node
            found.append(PluginInfo(name, path, definition.summary, definition.module.file, node.lineno))
    return found


@cache
def short_names(kind: Kind) -> dict[str, str]:
    """Dotted path by short name, for the built-in plug-ins of a kind."""
    base = lookup(kind.base)
    found: dict[str, str] = {}
    for place in kind.search_paths if isinstance(base, Definition) else ():
        for module in _files(place):
            for name, node in module.names.items():
                found.update(_named(kind, base, place, module, name, node))
    return found


def _named(kind: Kind, base: Definition, place: str, module: SourceModule, name: str, node: ast.AST) -> dict[str, str]:
    """The short name and dotted path of one name in a module; empty when it is none of the kind."""
    if isinstance(node, ast.ClassDef):
        definition = Definition(module, node)
        own = (
            definition.own_constant("name")
            if kind.short_name is None
            else None
            if name[0] == "_"
            else kind.short_name(name)
        )
        if own and derives(definition, base) and (kind.short_name is None or definition.dotted != base.dotted):
            return {str(own): f"{place}.{name}" if kind.short_name else definition.dotted}
    elif kind.short_name and isinstance(node, ast.ImportFrom) and f"{node.module}".startswith(f"{place}."):
        # imported by its package under a class's name: read only once it is asked for
        return (
            {kind.short_name(name): f"{place}.{name}"}
            if name[0].isupper() and name not in base.dotted.split(".")
            else {}
        )
    return {}


def _files(place: str) -> list[SourceModule]:
    """The modules of one of our packages; else the module itself, whose imports are its public names."""
    module = lookup(place)
    if not isinstance(module, SourceModule):
        return []
    if not place.startswith("fdl.") or not module.folders:
        return [module]
    stems = sorted({file.stem for folder in module.folders for file in folder.glob("*.py")} - {"__init__"})
    return [m for m in map(module.submodule, stems) if m is not None]


def missing_in_call(found: Definition, kind: Kind) -> str | None:
    """The argument that a class's `kind.required_method` would need, which fdl does not have."""
    for cls in ancestors(found) if kind.required_method and found.is_class else ():
        method = member(cls, kind.required_method) if cls is not None else None
        if method is not None:
            parameters = signature(method).parameters.values()
            return next((p.name for p in parameters if p.required), None)
    return None
