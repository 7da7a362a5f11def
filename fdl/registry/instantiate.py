"""From ``{target, args}`` to a checked component, and from that to an object.

Arguments are read along the annotations of the constructor that takes them. The same walk first checks a recipe, with
nothing imported, and later builds it, so that the two cannot disagree.
"""

from __future__ import annotations

import ast
import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.errors import UserError
from fdl.registry.installed import kind_of_class
from fdl.registry.kinds import KINDS, Kind
from fdl.registry.static_signatures import Parameter, argument_docs
from fdl.registry.static_source import Definition, SourceModule, ancestors, parse_expression
from fdl.registry.targets import ResolvedTarget, find
from fdl.utils.imports import import_dotted
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from fdl.registry.component import Component

_LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "MutableSequence", "tuple", "Tuple", "set", "frozenset"}
_DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}
_ANY = {"Any", "object"}
_TEXTUAL = {"enum.Enum", "os.PathLike", "pathlib.PurePath"}


def instantiate(component: Component | Mapping[str, Any], kind: str, key: str, **supplied: Any) -> Any:
    """Import and construct a component, and those among its arguments.

    Args:
        component: ``target`` and ``args``.
        kind: the name of one of `fdl.registry.kinds.KINDS`.
        key: where in the recipe it stands, for messages.
        supplied: arguments from fdl, passed where the constructor takes them and the recipe gives none.

    Returns:
        An instance of the kind's base class.

    Raises:
        UserError: naming the key, when the component cannot be found or its constructor refuses the arguments.
    """
    tree = component if isinstance(component, Mapping) else {"target": component.target, "args": component.args}
    builder = _ConfigBuilder(supplied)
    result = builder.component(tree, KINDS[kind], key)
    if builder.problems:
        raise UserError("\n".join(f"{where}: {message}" for where, message in builder.problems))
    return result


class ConfigChecker:
    """Checks values against annotations and collects every problem.

    Attributes:
        problems: pairs of a full key and what is wrong there.
    """

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []

    def problem(self, key: str, message: str) -> None:
        """Note one problem."""
        self.problems.append((key, message))

    def component(self, value: Any, kind: Kind, key: str, base: str = "", also: tuple[str, ...] = ()) -> Any:
        """Check one component and everything in it.

        Args:
            value: a short name, a dotted path, or a mapping with ``target`` and ``args``.
            kind: what it has to be.
            key: where it stands.
            base: dotted path of the class that it has to derive from; default the kind's.
            also: further keys that the mapping may have.

        Returns:
            The component in its full form, as far as it could be read.
        """
        if isinstance(value, str):
            value = {"target": value, "args": {}}
        if not isinstance(value, Mapping):
            self.problem(key, f"expected {kind}: a name, or target and args; got {show(value)}")
            return value
        for extra in value.keys() - {"target", "args", *also}:
            hint = suggest(extra, ["target", "args", *also], few=0)
            self.problem(f"{key}.{extra}", f"unknown key{hint or f'; arguments of the target stand under {key}.args'}")
        target, args = value.get("target"), value.get("args")
        args = {} if args is None else args
        if not isinstance(target, str) or target == "???":
            self.problem(f"{key}.target", f"missing: the name or dotted path of {kind}")
            return value
        if not isinstance(args, Mapping):
            self.problem(f"{key}.args", f"expected a mapping of argument names to values, got {show(args)}")
            return value
        try:
            found = find(target, kind, base)
        except UserError as error:
            self.problem(key, str(error))
            return value
        return self.made(found, kind, key, {**value, "target": target, "args": self.arguments(found, kind, args, key)})

    def arguments(self, found: ResolvedTarget, kind: Kind, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Check the arguments of one component; returns them with the components among them in full form."""
        if found.signature is None:
            return dict(args)
        known = found.signature.parameters
        result, renamed = {}, (found.definition.own_constant("renamed") if found.definition else None) or {}
        for name, value in args.items():
            where = f"{key}.args.{name}"
            if name in kind.forbidden:
                self.problem(where, f"{name} is given by fdl")
            elif name not in known and not found.signature.open:
                names = [n for n in known if n not in kind.forbidden]
                hint = f"; it is called {renamed[name]!r}" if name in renamed else _also_called(str(name), names)
                hint = hint or suggest(str(name), names, few=99)
                self.problem(where, f"{found.path} takes no {name!r}{hint}")
            else:
                result[name] = self.read(value, known.get(name, Parameter(name, False)), where)
        for name, parameter in known.items():
            given = name in args or name in (renamed[n] for n in args if n in renamed)  # said above
            if parameter.required and not given and not self.has(name, kind):
                self.problem(f"{key}.args.{name}", f"missing: {found.path} needs it{_meaning(found, parameter)}")
        return result

    def has(self, name: str, kind: Kind) -> bool:
        """Return True if fdl itself supplies an argument."""
        return name in kind.injected

    def made(self, found: ResolvedTarget, kind: Kind, key: str, tree: dict[str, Any]) -> Any:
        """Return the result for a component whose parts were read."""
        return tree

    def sequence(self, kind: str, items: list[Any]) -> Any:
        """Return the result for a list whose items were read."""
        return items

    def path(self, text: str) -> Any:
        """Return the result for a string given as a path."""
        return text

    def read(self, value: Any, parameter: Parameter, key: str) -> Any:
        """Check one value against a parameter's annotation; without one, anything goes."""
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
        # an alternative of the right shape whose inside is wrong says more than "expected this or that"
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
            return self.path(value) if isinstance(value, str) else _MISMATCH
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
        return self.sequence(name, items)

    def _class(self, value: Any, name: ast.expr, module: SourceModule | None, key: str) -> Any:
        """Read a value where the annotation names a class: a component, if it is one of ours."""
        found = module.resolve(name) if module is not None else None
        if isinstance(found, Definition) and found.is_class:
            kind = kind_of_class(found)
            if kind is not None:
                if not isinstance(value, str | Mapping):
                    return _MISMATCH
                return self.component(value, kind, key, found.dotted)
            if isinstance(value, Mapping) and "target" in value:
                return self.component(value, Kind(found.node.name, found.dotted), key)
            if value is None or isinstance(value, bool):
                return _MISMATCH
            # an enumeration may take its members' names; no other class is written as text
            textual = any(a is not None and a.dotted in _TEXTUAL for a in ancestors(found))
            return value if textual or not isinstance(value, str) else _MISMATCH
        alias = module.names.get(getattr(name, "id", "")) if module is not None else None
        if isinstance(alias, ast.Subscript | ast.BinOp):  # Metric = Literal["l1", "l2"]
            return self.read(value, Parameter("", False, alias, module), key)
        return value


class _ConfigBuilder(ConfigChecker):
    """Reads like `ConfigChecker`, and constructs what it has read."""

    def __init__(self, supplied: Mapping[str, Any]):
        super().__init__()
        self.supplied = supplied

    def has(self, name: str, kind: Kind) -> bool:
        return name in self.supplied

    def made(self, found: ResolvedTarget, kind: Kind, key: str, tree: dict[str, Any]) -> Any:
        if self.problems:
            return None
        args = dict(tree["args"])
        taken = found.signature.parameters if found.signature is not None else {}
        args.update({name: value for name, value in self.supplied.items() if name in taken and name not in args})
        factory = found.load()
        try:
            result = factory(**args)
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"{_blamed(error, key, args)}: {_explain(error)}") from error
        base = import_dotted(kind.base)
        if not isinstance(result, base):
            raise UserError(f"{key}: {found.path} made a {type(result).__name__}, expected {kind} ({kind.base})")
        return result

    def sequence(self, kind: str, items: list[Any]) -> Any:
        return {"tuple": tuple, "Tuple": tuple, "set": set, "frozenset": frozenset}.get(kind, list)(items)

    def path(self, text: str) -> Any:
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
"""What other libraries call arguments, by our name."""


def _also_called(name: str, known: list[str]) -> str:
    """A hint at the argument that another library calls so."""
    ours = next((ours for ours, theirs in _USUAL_NAMES.items() if name.lower() in theirs and ours in known), None)
    return f"; did you mean {ours!r}?" if ours else ""


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    """The members of a union, however it is written."""
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
    """An annotation in the words of a message: ``"int or null"``, ``"one of 'a', 'b'"``."""
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
    """A value and its type, short enough for a message."""
    if value is None:
        return "null"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"


def _blamed(error: Exception, key: str, args: Mapping[str, Any]) -> str:
    """The key of the argument that a constructor's message begins with, else the component's."""
    first = str(error).split(" ", 1)[0].rstrip(":,")
    return f"{key}.args.{first}" if first in args else key


def _explain(error: Exception) -> str:
    """A constructor's message; one that is not meant for users comes with its place."""
    if isinstance(error, UserError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({type(error).__name__}, {last.filename}:{last.lineno})"
