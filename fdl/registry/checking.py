"""Checks of a recipe's values against the annotations of the constructors that take them.

Sources are read and nothing is imported, so that a mistake is reported at once.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdl.errors import UserError
from fdl.registry.installed import kind_of_class
from fdl.registry.kinds import Kind
from fdl.registry.static_signatures import Parameter, argument_docs
from fdl.registry.static_source import Definition, SourceModule, ancestors, parse_expression
from fdl.registry.targets import ResolvedTarget, find
from fdl.utils.suggest import suggest

_LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "MutableSequence", "tuple", "Tuple", "set", "frozenset"}
_DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}
_ANY = {"Any", "object"}
_TEXTUAL = {"enum.Enum", "os.PathLike", "pathlib.PurePath"}
_CONVERTED_LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "Tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


@dataclass(frozen=True)
class CheckedComponent:
    """A component with a resolved target.

    Attributes:
        target: the resolved target.
        kind: the kind of plug-in.
        key: its full dotted key in the recipe.
        config: ``target``, checked ``args``, and the further keys of its section.
    """

    target: ResolvedTarget
    kind: Kind
    key: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """A value that is converted for a constructor, to a type that YAML lacks.

    Attributes:
        value: the list or string in the recipe.
        convert: the conversion to a tuple, set or path.
    """

    value: Any
    convert: Callable[[Any], Any]


def plain(checked: Any) -> Any:
    """Return a checked value in the form of a recipe, with all components in full form.

    Args:
        checked: a result of `ConfigChecker`.
    """
    if isinstance(checked, CheckedComponent):
        return plain(checked.config)
    if isinstance(checked, Converted):
        return plain(checked.value)
    return map_items(plain, checked)


def map_items(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the items of a dict or list; any other value is returned unchanged.

    Args:
        function: called with each item.
        value: a dict, a list, or a leaf of the tree.
    """
    if type(value) is dict:
        return {name: function(item) for name, item in value.items()}
    return [function(item) for item in value] if type(value) is list else value


class ConfigChecker:
    """Checks values against annotations and collects every problem.

    Components and values of another type come back as `CheckedComponent` and `Converted`: `fdl.registry.instantiate`
    builds the arguments of a constructor from these, and `plain` returns them to the form of a recipe.

    Args:
        supplied: names of the arguments that fdl passes itself; default those that a kind declares as injected.

    Attributes:
        problems: pairs of a full key and the problem there.
    """

    def __init__(self, supplied: Collection[str] | None = None) -> None:
        self.supplied = supplied
        self.problems: list[tuple[str, str]] = []

    def add_problem(self, key: str, message: str) -> None:
        """Record a problem.

        Args:
            key: the full dotted key.
            message: the problem there.
        """
        self.problems.append((key, message))

    def read_component(self, value: Any, kind: Kind, key: str, base: str = "", also: tuple[str, ...] = ()) -> Any:
        """Check a component and the components among its arguments.

        Args:
            value: a short name, a dotted path, or a mapping with ``target`` and ``args``.
            kind: the expected kind.
            key: its full dotted key in the recipe.
            base: dotted path of the class that it has to derive from; default the kind's.
            also: further keys that the mapping may have.

        Returns:
            A `CheckedComponent`; the value itself where its target cannot be resolved, which is a problem.
        """
        if isinstance(value, str):
            value = {"target": value, "args": {}}
        if not isinstance(value, Mapping):
            self.add_problem(key, f"expected {kind}: a name, or target and args; got {show(value)}")
            return value
        for extra in value.keys() - {"target", "args", *also}:
            hint = suggest(extra, ["target", "args", *also], few=0)
            hint = hint or f"; arguments of the target stand under {key}.args"
            self.add_problem(f"{key}.{extra}", f"unknown key{hint}")
        target, args = value.get("target"), value.get("args")
        args = {} if args is None else args
        if not isinstance(target, str) or target == "???":
            self.add_problem(f"{key}.target", f"missing: the name or dotted path of {kind}")
            return value
        if not isinstance(args, Mapping):
            self.add_problem(f"{key}.args", f"expected a mapping of argument names to values, got {show(args)}")
            return value
        try:
            found = find(target, kind, base)
        except UserError as error:
            self.add_problem(key, str(error))
            return value
        checked = {**value, "target": target, "args": self._arguments(found, kind, args, key)}
        return CheckedComponent(found, kind, key, checked)

    def _arguments(self, found: ResolvedTarget, kind: Kind, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Check the arguments of a component against the signature of its target."""
        if found.signature is None:
            return dict(args)
        known = found.signature.parameters
        result, renamed = {}, (found.definition.own_constant("renamed") if found.definition else None) or {}
        for name, value in args.items():
            where = f"{key}.args.{name}"
            if name in kind.forbidden:
                self.add_problem(where, f"{name} is given by fdl")
            elif name not in known and not found.signature.open:
                names = [n for n in known if n not in kind.forbidden]
                hint = f"; it is called {renamed[name]!r}" if name in renamed else _also_called(str(name), names)
                hint = hint or suggest(str(name), names, few=99)
                self.add_problem(where, f"{found.path} takes no {name!r}{hint}")
            else:
                result[name] = self.read(value, known.get(name, Parameter(name, False)), where)
        supplied = kind.injected if self.supplied is None else self.supplied
        for name, parameter in known.items():
            given = name in args or name in (renamed[n] for n in args if n in renamed)  # reported above
            if parameter.required and not given and name not in supplied:
                self.add_problem(f"{key}.args.{name}", f"missing: {found.path} needs it{_meaning(found, parameter)}")
        return result

    def read(self, value: Any, parameter: Parameter, key: str) -> Any:
        """Check a value against a parameter's annotation; without an annotation, any value is valid.

        Args:
            value: the value in the recipe.
            parameter: the parameter that receives it.
            key: its full dotted key.

        Returns:
            The value, with `CheckedComponent` and `Converted` where the annotation expects them.
        """
        if parameter.annotation is None:
            return value
        before = len(self.problems)
        attempts = []
        alternatives = _alternatives(parameter.annotation)
        for alternative in alternatives:
            outcome = self._one(value, alternative, parameter.module, key)
            if len(self.problems) == before and outcome is not _MISMATCH:
                return outcome
            attempts.append(self.problems[before:])
            del self.problems[before:]
        # an alternative of the right shape whose inside is wrong is more helpful than "expected this or that"
        closest = next((attempt for attempt in attempts if attempt), None)
        self.problems += closest or [(key, f"expected {describe(parameter.annotation)}, got {show(value)}")]
        return value

    def _one(self, value: Any, annotation: ast.expr, module: SourceModule | None, key: str) -> Any:
        """Read a value as one alternative; `_MISMATCH` when it is of another type altogether."""
        if isinstance(annotation, ast.Constant):
            return value if value is None and annotation.value is None else _MISMATCH
        base, inner = (annotation, None)
        if isinstance(annotation, ast.Subscript):
            base = annotation.value
            inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        if name in _ANY:
            return value
        if name in _SCALARS:
            return value if _SCALARS[name](value) else _MISMATCH
        if name == "Literal":
            allowed = [ast.literal_eval(choice) for choice in inner or ()]
            return value if any(value == a and type(value) is type(a) for a in allowed) else _MISMATCH
        if name == "Path":
            return Converted(value, _path) if isinstance(value, str) else _MISMATCH
        if name in _LISTS:
            return self._list(value, name, inner, module, key)
        if name in _DICTS:
            if not isinstance(value, Mapping):
                return _MISMATCH
            each = Parameter("", False, inner[1] if inner and len(inner) == 2 else None, module)
            return {k: self.read(v, each, f"{key}.{k}") for k, v in value.items()}
        return self._class(value, base, module, key)

    def _list(self, value: Any, name: str, inner: list[ast.expr] | None, module: SourceModule | None, key: str) -> Any:
        if not isinstance(value, list | tuple):
            return _MISMATCH
        inner = inner or [ast.Name("Any")]
        fixed = name in ("tuple", "Tuple") and not (isinstance(inner[-1], ast.Constant) and inner[-1].value is ...)
        if fixed and len(inner) != len(value) and ast.unparse(inner[0]) != "Any":
            return _MISMATCH
        annotations = inner if fixed and len(inner) == len(value) else inner[:1] * len(value)
        items = [
            self.read(item, Parameter("", False, annotation, module), f"{key}.{i}")
            for i, (item, annotation) in enumerate(zip(value, annotations))
        ]
        return Converted(items, _CONVERTED_LISTS[name]) if name in _CONVERTED_LISTS else items

    def _class(self, value: Any, name: ast.expr, module: SourceModule | None, key: str) -> Any:
        """Read a value where the annotation names a class: a component, if the class is a base class of plug-ins."""
        found = module.resolve(name) if module is not None else None
        if isinstance(found, Definition) and found.is_class:
            kind = kind_of_class(found)
            if kind is not None:
                if not isinstance(value, str | Mapping):
                    return _MISMATCH
                return self.read_component(value, kind, key, found.dotted)
            if isinstance(value, Mapping) and "target" in value:
                return self.read_component(value, Kind(found.node.name, found.dotted), key)
            if value is None or isinstance(value, bool):
                return _MISMATCH
            # an enumeration may take its members' names; no other class is written as text
            textual = any(a is not None and a.dotted in _TEXTUAL for a in ancestors(found))
            return value if textual or not isinstance(value, str) else _MISMATCH
        alias = module.names.get(getattr(name, "id", "")) if module is not None else None
        if isinstance(alias, ast.Subscript | ast.BinOp):  # Metric = Literal["l1", "l2"]
            return self.read(value, Parameter("", False, alias, module), key)
        return value


def _path(text: str) -> Path:
    return Path(text).expanduser()


_MISMATCH = object()
_SCALARS = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and not math.isnan(v),
    "str": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "None": lambda v: v is None,
}


def _meaning(found: ResolvedTarget, parameter: Parameter) -> str:
    """Describe an argument by its type and docstring."""
    typed = "" if parameter.annotation is None else describe(parameter.annotation)
    said = argument_docs(found.definition).get(parameter.name, "") if found.definition is not None else ""
    words = ", ".join(filter(None, (typed, said.partition(";")[0].rstrip("."))))
    return f" ({words})" if words else ""


_USUAL_NAMES = {
    "path": ("root", "dir", "folder", "directory", "file", "filename", "data_dir", "data_path", "image_dir"),
    "context": ("max_length", "max_len", "seq_len", "sequence_length", "block_size", "context_length"),
    "size": ("image_size", "img_size", "resolution", "input_size"),
    "text": ("text_column", "text_key", "column", "sentence"),
    "label": ("label_column", "label_key", "target_column"),
    "delimiter": ("sep", "separator"),
    "fraction": ("share", "ratio"),
    "proxy_fraction": ("subsample", "proxy_share"),
}
"""Names of arguments in other libraries, by fdl's name."""


def _also_called(name: str, known: list[str]) -> str:
    """Suggest the argument of fdl that has this name in another library."""
    ours = next((ours for ours, theirs in _USUAL_NAMES.items() if name.lower() in theirs and ours in known), None)
    return f"; did you mean {ours!r}?" if ours else ""


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    """Return the members of a union in any notation."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _alternatives(parse_expression(annotation.value))
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _alternatives(annotation.left) + _alternatives(annotation.right)
    if isinstance(annotation, ast.Subscript):
        name = annotation.value.attr if isinstance(annotation.value, ast.Attribute) else annotation.value.id
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if name == "Union":
            return [one for part in inner for one in _alternatives(part)]
        if name == "Optional":
            return [*_alternatives(inner[0]), ast.Constant(None)]
        if name in ("Annotated", "Final", "InitVar", "Required"):
            return _alternatives(inner[0])
    return [annotation]


def describe(annotation: ast.expr) -> str:
    """Describe an annotation for a message: ``"int or null"``, ``"one of 'a', 'b'"``.

    Args:
        annotation: the syntax tree of the annotation.
    """
    words = []
    for one in _alternatives(annotation):
        text = ast.unparse(one)
        if text == "None":
            text = "null"
        elif text.rpartition(".")[2].startswith("Literal["):
            values = one.slice.elts if isinstance(one.slice, ast.Tuple) else [one.slice]
            text = ("one of " if len(values) > 1 else "") + ", ".join(ast.unparse(v) for v in values)
        elif text in ("Path", "pathlib.Path"):
            text = "a path"
        words.append(text)
    return " or ".join(words)


def show(value: Any) -> str:
    """Format a value and its type, short enough for a message.

    Args:
        value: a value in a recipe.
    """
    if value is None:
        return "null"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"
