"""Short names of plug-ins: fdl's own and those of installed packages."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fdl.registry.installed import installed
from fdl.registry.kinds import KINDS, Kind
from fdl.registry.static_signatures import signature
from fdl.registry.static_source import Definition, SourceModule, ancestors, derives, lookup, member


@dataclass(frozen=True)
class PluginInfo:
    """A plug-in with a short name, as ``fdl list`` prints it.

    Attributes:
        name: its short name.
        path: its dotted path.
        summary: the first line of its docstring.
        file: the source file that defines it.
        line: the line of its definition in that file.
        distribution: the installed package that provides it; empty for fdl's own.
    """

    name: str
    path: str
    summary: str
    file: Path
    line: int
    distribution: str = ""


def entries(kind: Kind) -> list[PluginInfo]:
    """List all plug-ins of a kind that have a short name, sorted by name.

    Args:
        kind: the kind of plug-in.
    """
    found = []
    packages = {plugin.definition.dotted: plugin.distribution for plugin in installed()[0]}
    for name, path in sorted(short_names(kind).items()):
        definition = lookup(path)
        if isinstance(definition, Definition) and not missing_in_call(definition, kind):
            node = definition.node
            found.append(
                PluginInfo(name, path, definition.summary, definition.module.file, node.lineno, packages.get(path, ""))
            )
    return found


@cache
def short_names(kind: Kind) -> dict[str, str]:
    """Return the dotted path of each short name of a kind, without names that two installed packages share.

    Args:
        kind: the kind of plug-in.
    """
    own = built_in(kind)
    offered = [plugin for plugin in installed()[0] if plugin.kind == kind.name]
    names = {plugin.name: plugin.definition.dotted for plugin in offered if not conflict(kind, plugin.name)}
    return {**names, **own}


@cache
def conflict(kind: Kind, name: str) -> str:
    """Return a message that lists all packages with the same short name; empty if at most one has it.

    Args:
        kind: the kind of plug-in.
        name: the short name.
    """
    claims = [
        f"{p.distribution} ({p.definition.dotted})" for p in installed()[0] if (p.kind, p.name) == (kind.name, name)
    ]
    if claims and name in built_in(kind):
        claims.insert(0, f"fdl ({built_in(kind)[name]})")
    if len(claims) < 2:
        return ""
    return f"{kind.label} {name!r} is ambiguous, since {' and '.join(claims)} claim it; give one of these dotted paths"


def problems() -> list[str]:
    """List the problems of plug-ins of installed packages, one sentence each."""
    plugins, broken = installed()
    ambiguous = (conflict(KINDS[plugin.kind], plugin.name) for plugin in plugins)
    return [*broken, *dict.fromkeys(filter(None, ambiguous))]


@cache
def built_in(kind: Kind) -> dict[str, str]:
    """Return the dotted path of each short name of fdl's own plug-ins and of torch's optimisers and schedulers.

    Args:
        kind: the kind of plug-in.
    """
    base = lookup(kind.base)
    found: dict[str, str] = {}
    for place in kind.search_paths if isinstance(base, Definition) else ():
        for module in _files(place):
            for name, node in module.names.items():
                found.update(_named(kind, base, place, module, name, node))
    return found


def _named(kind: Kind, base: Definition, place: str, module: SourceModule, name: str, node: ast.AST) -> dict[str, str]:
    """Return the short name and dotted path of a name in a module; empty if it is not of the kind."""
    make = kind.short_name
    if isinstance(node, ast.ClassDef):
        definition = Definition(module, node)
        if make is None:
            own = definition.own_constant("name")
            return {str(own): definition.dotted} if own and derives(definition, base) else {}
        if name[0] != "_" and derives(definition, base) and definition.dotted != base.dotted:
            return {make(name): f"{place}.{name}"}
    elif make is not None and isinstance(node, ast.ImportFrom) and f"{node.module}".startswith(f"{place}."):
        # imported by its package under a class's name: read only when it is used
        return {make(name): f"{place}.{name}"} if name[0].isupper() and name not in base.dotted.split(".") else {}
    return {}


def _files(place: str) -> list[SourceModule]:
    """Return the modules of a package of fdl; for other packages the module itself, whose imports are public names."""
    module = lookup(place)
    if not isinstance(module, SourceModule):
        return []
    if not place.startswith("fdl.") or not module.folders:
        return [module]
    stems = sorted({file.stem for folder in module.folders for file in folder.glob("*.py")} - {"__init__"})
    return [m for m in map(module.submodule, stems) if m is not None]


def missing_in_call(found: Definition, kind: Kind) -> str | None:
    """Return the first required argument of a class's `kind.required_method`, which fdl calls without arguments.

    Args:
        found: the class.
        kind: the kind of plug-in.

    Returns:
        The argument's name; None if the method can be called without arguments.
    """
    for cls in ancestors(found) if kind.required_method and found.is_class else ():
        method = member(cls, kind.required_method) if cls is not None else None
        if method is not None:
            parameters = signature(method).parameters.values()
            return next((p.name for p in parameters if p.required), None)
    return None
