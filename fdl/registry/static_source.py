"""What Python source files define, read with `ast` and without importing anything.

Importing torch and lightning takes seconds; a mistake in a recipe should be reported at once. So names, base classes
and signatures of plug-ins are read from their source. What cannot be known this way (compiled modules, names made at
run time) is answered with None, and the caller imports.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Definition:
    """A class or function in a source file.

    Attributes:
        module: the file that holds it.
        node: its syntax tree.
        owner: the class that it is a method of, None at the top level.
    """

    module: SourceModule
    node: ast.ClassDef | ast.FunctionDef
    owner: Definition | None = None

    @property
    def dotted(self) -> str:
        """The full dotted path, e.g. ``"torch.optim.sgd.SGD"``."""
        return f"{self.owner.dotted if self.owner else self.module.name}.{self.node.name}"

    @property
    def is_class(self) -> bool:
        """Whether it is a class rather than a function."""
        return isinstance(self.node, ast.ClassDef)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (ast.get_docstring(self.node) or "").partition("\n")[0]

    def own_constant(self, name: str) -> object:
        """The literal that the class body itself assigns to `name`; None where it assigns none."""
        for statement in self.node.body:
            target, value = _assignment(statement)
            if target == name and value is not None:
                try:
                    return ast.literal_eval(value)
                except ValueError:
                    return None
        return None

    def constant(self, name: str) -> object:
        """The literal value of a class attribute, own or inherited; None where there is none."""
        values = (cls.own_constant(name) for cls in ancestors(self) if cls is not None)
        return next((value for value in values if value is not None), None)


class Parameter(NamedTuple):
    """One argument of a constructor or function.

    Attributes:
        name: its keyword.
        required: whether it has no default.
        annotation: its type as written, None where there is none.
        module: the file in which the annotation's names have their meaning.
        default: its default as written, None where there is none or the source does not tell.
    """

    name: str
    required: bool
    annotation: ast.expr | None = None
    module: SourceModule | None = None
    default: ast.expr | None = None


class Signature(NamedTuple):
    """What a constructor or function takes by keyword.

    Attributes:
        parameters: the named ones, by name.
        open: whether it also takes keywords that it does not name.
    """

    parameters: dict[str, Parameter]
    open: bool = False


class SourceModule:
    """One source file, or a namespace package's folders.

    Args:
        name: the module's dotted name.
        file: the file, None for a namespace package.
        folders: where submodules lie; empty for a module that is not a package.
    """

    def __init__(self, name: str, file: Path | None, folders: Iterable[Path] = ()):
        self.name, self.file, self.folders = name, file, list(folders)

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; empty where the file is no valid Python of this version."""
        try:
            return ast.parse(self.file.read_bytes()) if self.file else ast.Module([], [])
        except (SyntaxError, ValueError, OSError):
            return ast.Module([], [])

    @cached_property
    def names(self) -> dict[str, ast.AST]:
        """Top-level names: a class, a function, an import, or the expression that is assigned."""
        found: dict[str, ast.AST] = {}
        for name, node, sure in _bindings(self.tree.body):
            if sure or name not in found:
                found[name] = node
        return found

    @cached_property
    def stars(self) -> list[ast.ImportFrom]:
        """Its ``from … import *`` statements, but for those that only a type checker executes."""
        return [n for n in _executed(self.tree.body) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]

    @property
    def dynamic(self) -> bool:
        """Whether it may have names at run time that its source does not show."""
        if "__getattr__" in self.names or not self.tree.body:
            return bool(self.file)
        return any(isinstance(n, ast.Name) and n.id == "globals" for n in ast.walk(self.tree)) or any(
            isinstance(n, ast.Attribute) and n.attr == "modules" for n in ast.walk(self.tree)
        )

    def public(self) -> list[str]:
        """Names and submodules without a leading underscore."""
        files = {f.stem for folder in self.folders for f in folder.glob("*.py")}
        return sorted(name for name in {*self.names, *files} if not name.startswith("_") and name != "*")

    def submodule(self, part: str) -> SourceModule | None:
        """The module `part` of this package."""
        return _submodule(self, part)

    def member(self, part: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition | SourceModule | None:
        """What the attribute `part` of this module is, followed through imports and aliases."""
        step = (self.name, part)
        if step not in seen:
            seen |= {step}
            if part in self.names:
                found = self._bound(self.names[part], seen)
                if found is not None:
                    return found
            for star in self.stars:
                source = self._imported(star)
                found = source.member(part, seen) if source else None
                if found is not None:
                    return found
        return self.submodule(part)

    def resolve(
        self, expression: ast.expr, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Definition | SourceModule | None:
        """What a name or attribute means in this file."""
        if isinstance(expression, ast.Subscript):
            return self.resolve(expression.value, seen)
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            return self.resolve(parse_expression(expression.value), seen)
        if isinstance(expression, ast.Name):
            return self.member(expression.id, seen)
        if isinstance(expression, ast.Attribute):
            return member(self.resolve(expression.value, seen), expression.attr, seen)
        return None

    def _bound(self, node: ast.AST, seen: frozenset[tuple[str, str]]) -> Definition | SourceModule | None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            return Definition(self, node)
        if isinstance(node, ast.Import):
            return module_of(node.names[0].name)
        if isinstance(node, ast.ImportFrom):
            source = self._imported(node)
            return source.member(node.names[0].name, seen) if source else None
        return self.resolve(node, seen) if isinstance(node, ast.Name | ast.Attribute) else None

    def _imported(self, node: ast.ImportFrom) -> SourceModule | None:
        """The module after ``from``, relative or not."""
        name = node.module or ""
        if node.level:
            package = self.name.split(".") if self.folders else self.name.split(".")[:-1]
            package = package[: len(package) - node.level + 1]
            name = ".".join([*package, *([name] if name else [])])
        return module_of(name)

    def __repr__(self) -> str:
        return f"SourceModule({self.name})"


@cache
def top_level(name: str) -> SourceModule | None:
    """The top-level module or package of this name, where Python would find it; None when it is no Python source."""
    try:
        spec = importlib.util.find_spec(name)
    except (ValueError, ImportError):  # a module without a spec, such as one made by hand
        return None
    if spec is None:
        return None
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    if spec.origin == "frozen":  # a module compiled into Python, such as abc, whose source lies beside the others
        file = next((f for f in [Path(sysconfig.get_path("stdlib"), f"{name}.py")] if f.is_file()), None)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return SourceModule(name, file, folders) if file or folders else None


@cache
def module_of(dotted: str) -> SourceModule | None:
    """The module that an import statement means by a dotted path."""
    first, *rest = dotted.split(".")
    found = top_level(first)
    for part in rest:
        found = found.submodule(part) if found else None
    return found


@cache
def lookup(dotted: str) -> Definition | SourceModule | None:
    """The module, class or function that a dotted path means; None when the source does not tell."""
    first, *rest = dotted.split(".")
    found: Definition | SourceModule | None = top_level(first)
    for part in rest:
        found = member(found, part)
    return found


def member(
    owner: Definition | SourceModule | None, part: str, seen: frozenset[tuple[str, str]] = frozenset()
) -> Definition | SourceModule | None:
    """The attribute `part` of a module or class."""
    if isinstance(owner, SourceModule):
        return owner.member(part, seen)
    if owner is not None and owner.is_class:
        for statement in reversed(owner.node.body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == part:
                return Definition(owner.module, statement, owner)
    return None


def ancestors(definition: Definition) -> Iterator[Definition | None]:
    """A class and its bases, nearest first, depth first; None stands for a base that the source does not tell."""
    yield definition
    for base in definition.node.bases if definition.is_class else ():
        found = definition.module.resolve(base)
        if isinstance(found, Definition) and found.is_class:
            yield from ancestors(found)
        elif not (isinstance(base, ast.Name) and hasattr(builtins, base.id)):
            yield None


def derives(definition: Definition, base: Definition) -> bool | None:
    """Whether a class is `base` or a subclass of it; None when the source does not tell."""
    unknown = False
    for ancestor in ancestors(definition):
        if ancestor is None:
            unknown = True
        elif ancestor.dotted == base.dotted:
            return True
    return None if unknown else False


@cache
def signature(definition: Definition) -> Signature | None:
    """What a class or function takes by keyword; None when the source does not tell."""
    if not definition.is_class:
        kinds = {_last_name(d) for d in definition.node.decorator_list}
        bound = definition.owner is not None and "staticmethod" not in kinds
        return _of_function(definition.node, definition.module, skip_first=bound)[0]
    if (init := member(definition, "__init__") or member(definition, "__new__")) is not None:
        result, forwarded = _of_function(init.node, init.module, skip_first=True)
        return _with_inherited(result, forwarded, definition) if forwarded is not None else result
    if any(_last_name(d) == "dataclass" for d in definition.node.decorator_list):
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
    """What docstrings say of arguments by their names, of a class itself before those of its bases."""
    nodes = [cls.node for cls in ancestors(definition) if cls is not None] if definition.is_class else [definition.node]
    docs: dict[str, str] = {}
    for node in nodes:
        text = (ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
        for name, said in re.findall(r"^ {4}(\w+)[^:\n]*: (.*(?:\n {5,}.*)*)", text, re.MULTILINE):
            docs.setdefault(name, " ".join(said.split()).replace("``", ""))
    return docs


_WITHOUT_INIT = {"abc.ABC", "typing.Generic", "typing.Protocol", "typing_extensions.Protocol"}


def parse_expression(text: str) -> ast.expr:
    """The syntax tree of an annotation given as text; a constant when it is not valid Python."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return ast.Constant(None)


def _of_function(node: ast.FunctionDef, module: SourceModule, skip_first: bool) -> tuple[Signature, set[str] | None]:
    """A function's signature; and, when it hands ``**kwargs`` on to its base class, what it gives there itself."""
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
    """The generated constructor of a dataclass, with the fields that it inherits."""
    parameters: dict[str, Parameter] = {}
    lineage = [c for c in ancestors(definition) if c is not None]
    for cls in reversed(lineage):
        if not any(_last_name(d) == "dataclass" for d in cls.node.decorator_list):
            continue
        for statement in cls.node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if _last_name(statement.annotation) in ("ClassVar", "KW_ONLY"):
                continue
            required, initialised = statement.value is None, True
            if isinstance(statement.value, ast.Call) and _last_name(statement.value) == "field":
                options = {k.arg: k.value for k in statement.value.keywords}
                required = not options.keys() & {"default", "default_factory"}
                initialised = not (isinstance(options.get("init"), ast.Constant) and options["init"].value is False)
            name = statement.target.id
            parameters.pop(name, None) if not initialised else None
            if initialised:
                parameters[name] = Parameter(name, required, statement.annotation, cls.module)
    return Signature(parameters)


def _bindings(body: Iterable[ast.stmt], sure: bool = True) -> Iterator[tuple[str, ast.AST, bool]]:
    """Names that statements bind; those of a second branch are not sure and never hide an earlier one."""
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            yield statement.name, statement, sure
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                # `import a.b` binds a; `import a.b as c` binds c to a.b
                one = alias if alias.asname else ast.alias(alias.name.partition(".")[0])
                yield alias.asname or one.name, ast.Import([one]), sure
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name, ast.ImportFrom(statement.module, [alias], statement.level), sure
        elif isinstance(statement, ast.If):
            yield from _bindings(statement.body, sure)
            yield from _bindings(statement.orelse, False)
        elif isinstance(statement, ast.Try):
            yield from _bindings([*statement.body, *statement.orelse, *statement.finalbody], sure)
            for handler in statement.handlers:
                yield from _bindings(handler.body, False)
        elif isinstance(statement, ast.With):
            yield from _bindings(statement.body, sure)
        else:
            target, value = _assignment(statement)
            if target and value is not None:
                yield target, value, sure


def _executed(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements and those in the branches of if and try, without ``if TYPE_CHECKING`` blocks."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try) and _last_name(getattr(statement, "test", None)) != "TYPE_CHECKING":
            yield from _executed([*statement.body, *statement.orelse])
        else:
            yield statement


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and value of ``name = value`` and ``name: type = value``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    return None, None


def _last_name(node: ast.AST | None) -> str:
    """``"dataclass"`` for ``@dataclass``, ``@dataclasses.dataclass`` and ``@dataclass(frozen=True)``."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@cache
def _submodule(package: SourceModule, part: str) -> SourceModule | None:
    for folder in package.folders:
        inner = folder / part
        if (inner / "__init__.py").is_file():
            return SourceModule(f"{package.name}.{part}", inner / "__init__.py", [inner])
        if inner.with_suffix(".py").is_file() and part.isidentifier():
            return SourceModule(f"{package.name}.{part}", inner.with_suffix(".py"))
    for folder in package.folders:
        if (folder / part).is_dir() and part.isidentifier():
            return SourceModule(f"{package.name}.{part}", None, [folder / part])
    return None
