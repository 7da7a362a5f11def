"""Resolution of a recipe's `target`, a short name or dotted path, without importing it."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from fdl.errors import UserError
from fdl.registry.kinds import Kind
from fdl.registry.plugins import conflict, missing_in_call, short_names
from fdl.registry.static_signatures import Parameter, Signature, signature
from fdl.registry.static_source import Definition, SourceModule, derives, lookup, top_level
from fdl.utils.imports import _near_package, import_dotted
from fdl.utils.suggest import suggest


@dataclass(frozen=True)
class ResolvedTarget:
    """A resolved `target`.

    Attributes:
        path: its dotted path.
        definition: its source, None where only an import could tell.
        signature: its keyword arguments; None for a compiled class without a signature.
    """

    path: str
    definition: Definition | None
    signature: Signature | None

    def load(self) -> Any:
        """Import the target."""
        return import_dotted(self.path)


@cache
def find(target: str, kind: Kind, base: str = "") -> ResolvedTarget:
    """Resolve a `target`, without importing it if its source suffices.

    Args:
        target: a short name of the kind, or a dotted path.
        kind: the expected kind.
        base: dotted path of the class that it has to derive from; default the kind's.

    Raises:
        UserError: the target does not exist or is not of the kind; the message is without the recipe's key.
    """
    if _is_path(target):
        raise UserError(f"{target!r} is a path; expected the name of {kind}{_reader(target, kind)}")
    if "." not in target:
        names = short_names(kind)
        if message := conflict(kind, target):
            raise UserError(message)
        if target not in names:
            raise UserError(f"unknown {kind.label} {target!r}{suggest(target, names) or '; or give a dotted path'}")
        target = names[target]
    base = base or kind.base
    found = lookup(target)
    if isinstance(found, SourceModule):
        raise UserError(f"{target} is a module, expected {kind} in it")
    if found is None:
        return _import_target(target, kind, base)
    fits = _fits(found, lookup(base))
    if fits is None:
        return _import_target(target, kind, base)
    if not fits:
        raise UserError(f"{target} is not {kind}: it does not derive from {base}")
    if missing := missing_in_call(found, kind):
        raise UserError(f"{target} cannot be used: its {kind.required_method}() needs {missing!r}")
    arguments = signature(found)
    return ResolvedTarget(target, found, arguments if arguments is not None else _inspect(import_dotted(target)))


_READERS = {
    (".txt", ".md", ".txt.gz", ".md.gz"): "text_files, args: {path: PATH, context: 64}",
    (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz", ".parquet"): (
        "text_table, args: {path: PATH, context: 64, text: text}"
    ),
    (".npz",): "arrays, args: {path: PATH}",
    (".tar", ".tar.gz", ".tgz"): "image_text_shards, args: {path: PATH, size: 224}",
}
"""Component of the data module that reads files, by their endings."""


def _is_path(target: str) -> bool:
    """Return True if `target` looks like a file or folder."""
    return "/" in target or target.lower().endswith(tuple(end for ends in _READERS for end in ends))


def _reader(target: str, kind: Kind) -> str:
    """Suggest the data module that reads a path."""
    if kind.name != "datamodule":
        return ", or a dotted path"
    found = next((how for ends, how in _READERS.items() if target.lower().endswith(ends)), None)
    if found is None:
        found = "NAME, args: {path: PATH}"
    return f"; to read it, write {{target: {found.replace('PATH', target)}}}"


def _fits(found: Definition, base: Definition | SourceModule | None) -> bool | None:
    """Return True if calling `found` makes a `base`; None if the source does not show it."""
    if not isinstance(base, Definition):
        return None
    if found.is_class:
        return derives(found, base)
    if found.node.returns is None:
        return True  # a function without annotation: its result is checked after the call
    made = found.module.resolve(found.node.returns)
    if made is None and hasattr(builtins, ast.unparse(found.node.returns)):
        return False
    return not (isinstance(made, Definition) and made.is_class and derives(made, base) is False)


def _import_target(target: str, kind: Kind, base: str) -> ResolvedTarget:
    """Resolve a target by importing it, for targets that the source does not show."""
    _refuse_missing(target)
    found = import_dotted(target)
    if not callable(found):
        raise UserError(f"{target} is a {type(found).__name__}, expected {kind}")
    if inspect.isclass(found) and not issubclass(found, import_dotted(base)):
        raise UserError(f"{target} is not {kind}: it does not derive from {base}")
    return ResolvedTarget(target, None, _inspect(found))


def _refuse_missing(target: str) -> None:
    """Raise UserError, without importing, if sources show that a dotted path does not exist."""
    parts = target.split(".")
    if top_level(parts[0]) is None and importlib.util.find_spec(parts[0]) is None:
        raise UserError(f"{target}: there is no module {parts[0]!r}{_near_package(parts[0])}")
    for i in range(1, len(parts)):
        owner, part = lookup(".".join(parts[:i])), parts[i]
        readable = isinstance(owner, SourceModule) and not owner.dynamic and part not in owner.names
        if readable and lookup(".".join(parts[: i + 1])) is None and not _compiled(owner, part):
            raise UserError(f"{target}: {owner.name} has no {part!r}{suggest(part, owner.public(), few=0)}")


def _compiled(package: SourceModule, part: str) -> bool:
    return any(any(folder.glob(f"{part}.*")) for folder in package.folders)


def _inspect(found: Any) -> Signature | None:
    """Return the signature of an imported callable; None if it has none."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return Signature(
        {p.name: Parameter(p.name, p.default is inspect.Parameter.empty) for p in parameters if p.kind in named},
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )
