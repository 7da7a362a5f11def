"""Signatures of classes and functions, read from their source without importing it."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import NamedTuple

from fdl.registry.static_source import Definition, SourceModule, ancestors, last_name, member


class Parameter(NamedTuple):
    """A parameter of a constructor or function.

    Attributes:
        name: its keyword.
        required: True if it has no default.
        annotation: its type annotation as written; None without one.
        module: the source module in which names of the annotation are resolved.
        default: its default as written; None without one, or if the source does not show it.
    """

    name: str
    required: bool
    annotation: ast.expr | None = None
    module: SourceModule | None = None
    default: ast.expr | None = None


class Signature(NamedTuple):
    """Keyword arguments of a constructor or function.

    Attributes:
        parameters: the named parameters, by name.
        open: True if it also takes arbitrary keywords.
    """

    parameters: dict[str, Parameter]
    open: bool = False


@cache
def signature(definition: Definition) -> Signature | None:
    """Return the keyword arguments of a class or function.

    Args:
        definition: a class or function.

    Returns:
        The signature; None if the source does not show it.
    """
    if not definition.is_class:
        kinds = {last_name(d) for d in definition.node.decorator_list}
        bound = definition.owner is not None and "staticmethod" not in kinds
        return _of_function(definition.node, definition.module, skip_first=bound)[0]
    if (init := member(definition, "__init__") or member(definition, "__new__")) is not None:
        result, forwarded = _of_function(init.node, init.module, skip_first=True)
        return _with_inherited(result, forwarded, definition) if forwarded is not None else result
    if any(last_name(d) == "dataclass" for d in definition.node.decorator_list):
        return _of_dataclass(definition)
    for base in definition.node.bases:
        found = definition.module.resolve(base)
        if isinstance(found, Definition) and found.is_class:
            if found.dotted in _WITHOUT_INIT:
                continue
            return signature(found)
        if not (isinstance(base, ast.Name) and base.id == "object"):
            return None
    return Signature({})


@cache
def argument_docs(definition: Definition) -> dict[str, str]:
    """Collect the descriptions of arguments from docstrings; a class's own precede those of its bases.

    Args:
        definition: a class or function.

    Returns:
        The description of each argument, by name.
    """
    nodes = [cls.node for cls in ancestors(definition) if cls is not None] if definition.is_class else [definition.node]
    docs: dict[str, str] = {}
    for node in nodes:
        text = (ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
        for name, said in re.findall(r"^ {4}(\w+)[^:\n]*: (.*(?:\n {5,}.*)*)", text, re.MULTILINE):
            docs.setdefault(name, " ".join(said.split()).replace("``", ""))
    return docs


_WITHOUT_INIT = {"abc.ABC", "typing.Generic", "typing.Protocol", "typing_extensions.Protocol"}


def _of_function(node: ast.FunctionDef, module: SourceModule, skip_first: bool) -> tuple[Signature, set[str] | None]:
    """Read a function's signature and, if it forwards ``**kwargs`` to its base class, the keywords it sets itself."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(positional, defaults))[len(arguments.posonlyargs) or int(skip_first) :]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults)
    parameters = {a.arg: Parameter(a.arg, d is None, a.annotation, module, d) for a, d in pairs}
    if arguments.kwarg is None:
        return Signature(parameters), None
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        hands_on = any(
            k.arg is None and isinstance(k.value, ast.Name) and k.value.id == arguments.kwarg.arg for k in call.keywords
        )
        if hands_on and ast.unparse(call.func) == "super().__init__" and not call.args:
            return Signature(parameters), {k.arg for k in call.keywords if k.arg}
    return Signature(parameters, open=True), None


def _with_inherited(own: Signature, given: set[str], definition: Definition) -> Signature:
    """Add the base class's parameters that reach it through ``**kwargs``."""
    for base in definition.node.bases:
        found = definition.module.resolve(base)
        inherited = signature(found) if isinstance(found, Definition) else None
        if inherited is None:
            return Signature(own.parameters, open=True)
        if inherited.parameters or inherited.open:
            passed = {n: p for n, p in inherited.parameters.items() if n not in given}
            return Signature({**passed, **own.parameters}, inherited.open)
    return own


def _of_dataclass(definition: Definition) -> Signature:
    """Derive the generated constructor of a dataclass, including inherited fields."""
    parameters: dict[str, Parameter] = {}
    lineage = [c for c in ancestors(definition) if c is not None]
    for cls in reversed(lineage):
        if not any(last_name(d) == "dataclass" for d in cls.node.decorator_list):
            continue
        for statement in cls.node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if last_name(statement.annotation) in ("ClassVar", "KW_ONLY"):
                continue
            required, initialised = statement.value is None, True
            if isinstance(statement.value, ast.Call) and last_name(statement.value) == "field":
                options = {k.arg: k.value for k in statement.value.keywords}
                required = not options.keys() & {"default", "default_factory"}
                initialised = not (isinstance(options.get("init"), ast.Constant) and options["init"].value is False)
            name = statement.target.id
            parameters.pop(name, None) if not initialised else None
            if initialised:
                parameters[name] = Parameter(name, required, statement.annotation, cls.module)
    return Signature(parameters)
