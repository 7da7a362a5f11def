"""Plug-ins of installed packages, found by the entry points of group ``fdl.plugins``.

An entry point names a class (``package.module:Class``), or a module or package whose classes are all offered.
Sources are read, nothing is imported: a package that is broken costs a line of ``fdl list``, and not the command.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from fdl.registry.kinds import KINDS, Kind
from fdl.registry.static_source import Definition, SourceModule, derives, lookup

GROUP = "fdl.plugins"


class InstalledPlugin(NamedTuple):
    """A plug-in of an installed package.

    Attributes:
        kind: the name of its kind.
        name: its short name: the class's attribute `name`, else the entry point's name.
        definition: its class definition.
        distribution: the package's name on PyPI.
    """

    kind: str
    name: str
    definition: Definition
    distribution: str


@cache
def installed() -> tuple[list[InstalledPlugin], list[str]]:
    """Find the plug-ins of all installed packages.

    Returns:
        The plug-ins, and one sentence per entry point or class that is not usable.
    """
    found: dict[tuple[str, str, str], InstalledPlugin] = {}
    problems: list[str] = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: (_distribution(p), p.name)):
        where = f"{_distribution(point)}: entry point {point.name} = {point.value}"
        classes = list(_classes(point))
        if not classes:
            problems.append(f"{where}: {_reason(point)}")
        for name, definition in classes:
            kind = kind_of_class(definition)
            if kind is None:
                problems.append(f"{where}: {definition.dotted} derives from no base class of fdl's plug-ins")
            else:
                plugin = InstalledPlugin(kind.name, name, definition, _distribution(point))
                found[kind.name, name, definition.dotted] = plugin
    return list(found.values()), problems


def kind_of_class(base: Definition) -> Kind | None:
    """Return the kind whose base class `base` is or derives from; None if there is none.

    Args:
        base: a class definition.
    """
    for kind in KINDS.values():
        root = lookup(kind.base)
        if isinstance(root, Definition) and derives(base, root):
            return kind
    return None


def _classes(point: EntryPoint) -> Iterator[tuple[str, Definition]]:
    """Yield the short names and classes of an entry point; none if its source cannot be read."""
    owner = lookup(_dotted(point))
    if isinstance(owner, Definition):
        if owner.is_class:
            yield str(owner.own_constant("name") or point.name), owner
        return
    for module in _modules(owner):
        for node in module.names.values():
            definition = Definition(module, node) if isinstance(node, ast.ClassDef) else None
            if definition is not None and (own := definition.own_constant("name")):
                yield str(own), definition


def _modules(module: SourceModule | None) -> Iterator[SourceModule]:
    """Yield a module and, for a package, the modules in its folder."""
    if module is None:
        return
    yield module
    stems = {file.stem for folder in module.folders for file in folder.glob("*.py")} - {"__init__", "__main__"}
    yield from filter(None, map(module.submodule, sorted(stems)))


def _reason(point: EntryPoint) -> str:
    """Explain why an entry point offers no plug-in."""
    parts = _dotted(point).split(".")
    for end in range(1, len(parts) + 1):
        dotted = ".".join(parts[:end])
        found = lookup(dotted)
        if found is None:
            return f"there is no {dotted}" if end > 1 else f"there is no module {dotted}"
        if isinstance(found, SourceModule) and (error := _syntax_error(found)):
            return error
    return "it is no class, and no module with classes that have a name"


def _syntax_error(module: SourceModule) -> str | None:
    try:
        ast.parse(module.file.read_bytes() if module.file else b"")
    except (SyntaxError, ValueError, OSError) as error:
        return f"{module.file} cannot be read: {error}"
    return None


def _dotted(point: EntryPoint) -> str:
    return point.value.partition("[")[0].strip().replace(":", ".").replace(" ", "")


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "?"
