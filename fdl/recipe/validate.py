"""Completion and validation of a tree of plain values by nested dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from fdl.registry.checking import ConfigChecker, describe, plain, show
from fdl.registry.component import Component
from fdl.registry.kinds import KINDS
from fdl.registry.static_signatures import Parameter
from fdl.registry.static_source import SourceModule, parse_expression
from fdl.utils.suggest import suggest


def fill(tree: Any, schema: type, default: Any = None) -> Any:
    """Expand short forms and add missing keys with their defaults.

    A component that names a target starts without arguments, so that those of a default never leak into another
    optimiser. What does not fit the schema is left as it is, for `check` to report.

    Args:
        tree: the user's recipe, plain dicts and lists.
        schema: a dataclass.
        default: plain default values; those of the schema when None.
    """
    if not isinstance(tree, Mapping):
        return tree
    default = defaults(schema) if default is None else default
    if issubclass(schema, Component):
        if "target" not in tree and default.get("target", "???") != "???":
            return {**default, **tree, "args": {**default["args"], **_mapping(tree.get("args"))}}
        return {**defaults(schema), **tree, "args": {} if tree.get("args") is None else tree["args"]}
    result = {}
    for name, (hint, _, _) in shape(schema).items():
        value = tree.get(name, default[name])
        if name not in tree:
            result[name] = value
        elif (item := _item(hint)) is not None and isinstance(value, list):
            result[name] = [fill(_full(one), item) for one in value]
        elif dataclasses.is_dataclass(hint):
            result[name] = fill(_full(value) if issubclass(hint, Component) else value, hint, default[name])
        else:
            result[name] = value
    return {**result, **{name: value for name, value in tree.items() if name not in result}}


def defaults(schema: type) -> dict[str, Any]:
    """Return the default of every key as plain values; ``"???"`` for keys that a recipe must give.

    Args:
        schema: a dataclass.
    """
    result = {}
    for name, (hint, optional, field) in shape(schema).items():
        if dataclasses.is_dataclass(hint) and not issubclass(hint, Component):
            # read from the fields, since an instance may have changed them in __post_init__
            result[name] = None if optional else defaults(hint)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            result[name] = [_plain(one) for one in value] if isinstance(value, list) else _plain(value)
        else:
            result[name] = field.default
    return result


def check(
    tree: Mapping[str, Any], schema: type, module: SourceModule, checker: ConfigChecker, prefix: str = ""
) -> dict:
    """Check a filled tree and all its components.

    Args:
        tree: from `fill`, without interpolations.
        schema: a dataclass.
        module: the schema's source module, in which its annotations are resolved.
        checker: collects the problems.
        prefix: the tree's own key with a dot, empty at the top.

    Returns:
        The tree with nested components in full form.
    """
    result = {}
    fields = shape(schema)
    for name, value in tree.items():
        where = f"{prefix}{name}"
        if name not in fields:
            checker.add_problem(
                where, f"unknown key{suggest(str(name), fields) if prefix else _suggest_anywhere(name, schema)}"
            )
            continue
        hint, optional, field = fields[name]
        item = _item(hint)
        component = next((t for t in (hint, item) if isinstance(t, type) and issubclass(t, Component)), None)
        if value is None and optional:
            result[name] = None
        elif component is not None:
            kind = KINDS[field.metadata["kind"]]
            also = tuple(shape(component).keys() - {"target", "args"})
            if item is None:
                result[name] = _component(value, kind, component, module, checker, where, also)
            elif isinstance(value, list):
                entries = enumerate(value)
                result[name] = [
                    _component(v, kind, component, module, checker, f"{where}.{i}", also) for i, v in entries
                ]
            else:
                checker.add_problem(where, f"expected a list, each entry {kind}; got {show(value)}")
        elif dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                result[name] = check(value, hint, module, checker, f"{where}.")
            else:
                checker.add_problem(
                    where, f"expected a mapping with keys such as {next(iter(shape(hint)))}, got {show(value)}"
                )
        elif value == "???":
            checker.add_problem(where, f"missing: {field.metadata['doc']}")
        else:
            result[name] = _leaf(value, field, module, checker, where)
    return result


@cache
def shape(schema: type) -> dict[str, tuple[Any, bool, dataclasses.Field]]:
    """Return the fields of a schema by name: the type without None, True if None is allowed, and the field.

    Args:
        schema: a dataclass.
    """
    hints = typing.get_type_hints(schema)
    result = {}
    for field in dataclasses.fields(schema):
        hint, optional = hints[field.name], False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            members = typing.get_args(hint)
            optional = type(None) in members
            rest = [member for member in members if member is not type(None)]
            hint = rest[0] if len(rest) == 1 else hint
        result[field.name] = (hint, optional, field)
    return result


def keys(schema: type, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """List every key of a schema: its path, type, default and help text.

    Args:
        schema: a dataclass.
        prefix: the schema's own key with a dot, empty at the top.
    """
    result = []
    for name, (hint, optional, field) in shape(schema).items():
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.metadata.get("kind") is None and dataclasses.is_dataclass(hint):
            text = "may be null" if optional else ""
            result.append((f"{prefix}{name}", text, None, field.metadata["doc"]))
            result += keys(hint, f"{prefix}{name}.")
        else:
            kind = field.metadata.get("kind")
            text = describe(parse_expression(field.type)) if kind is None else kind
            text = f"list of {KINDS[kind].plural}" if kind and _item(hint) else text
            if kind and optional:
                text += " or null"
            result.append((f"{prefix}{name}", text, default, field.metadata.get("doc", "")))
    return result


def _component(
    value: Any, kind: Any, schema: type, module: SourceModule, checker: ConfigChecker, where: str, also: tuple[str, ...]
) -> Any:
    result = plain(checker.read_component(value, kind, where, also=also))
    for name in also:
        if isinstance(value, Mapping) and name in value:
            _leaf(value[name], shape(schema)[name][2], module, checker, f"{where}.{name}")
    return result


def _leaf(value: Any, field: dataclasses.Field, module: SourceModule, checker: ConfigChecker, where: str) -> Any:
    before = len(checker.problems)
    value = plain(checker.read(value, Parameter(field.name, False, parse_expression(field.type), module), where))
    bounds = field.metadata.get("bounds")
    if len(checker.problems) == before and bounds is not None and value is not None and value not in bounds:
        checker.add_problem(where, f"must be {bounds}, got {value}")
    return value


def _suggest_anywhere(name: Any, schema: type) -> str:
    """Suggest the nearest key of the same level, else a key of that name further down."""
    near = suggest(str(name), shape(schema), few=0)
    deeper = [path for path, *_ in keys(schema) if path.rpartition(".")[2] == name]
    if deeper and not near.endswith(f"{name}'?"):
        return f"; did you mean {deeper[0]!r}?"
    return near or suggest(str(name), shape(schema), few=99)


def _item(hint: Any) -> type | None:
    """Return the component type in ``list[Component]``; None for other types."""
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return typing.get_args(hint)[0]
    return None


def _full(value: Any) -> Any:
    """Expand a component's short form."""
    return {"target": value, "args": {}} if isinstance(value, str) and not value.startswith("${") else value


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _copy(default: Any) -> Any:
    if isinstance(default, list):
        return [_copy(one) for one in default]
    if dataclasses.is_dataclass(default):
        return dataclasses.replace(
            default, **{f.name: _copy(getattr(default, f.name)) for f in dataclasses.fields(default)}
        )
    return dict(default) if isinstance(default, dict) else default
