"""Definitions in Python source files, read with `ast` without importing anything.

Importing torch and lightning takes seconds; a mistake in a recipe should be reported at once. So names, base classes
and signatures of plug-ins are read from their source. Functions return None where the source does not show the result
(compiled modules, names created at run time), and the caller imports.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path


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
        """True for a class, False for a function."""
        return isinstance(self.node, ast.ClassDef)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (ast.get_docstring(self.node) or "").partition("\n")[0]

    def own_constant(self, name: str) -> object:
        """Return the literal that the class body itself assigns to `name`; None without an assignment.

        Args:
            name: a class attribute.
        """
        for statement in self.node.body:
            target, value = _assignment(statement)
            if target == name and value is not None:
                try:
                    return ast.literal_eval(value)
                except ValueError:
                    return None
        return None

    def constant(self, name: str) -> object:
        """Return the literal value of a class attribute, own or inherited; None without one.

        Args:
            name: the class attribute.
        """
        values = (cls.own_constant(name) for cls in ancestors(self) if cls is not None)
        return next((value for value in values if value is not None), None)


class SourceModule:
    """One source file, or a namespace package's folders.

    Args:
        name: the module's dotted name.
        file: the file, None for a namespace package.
        folders: the folders of submodules; empty for a module that is not a package.
    """

    def __init__(self, name: str, file: Path | None, folders: Iterable[Path] = ()):
        self.name, self.file, self.folders = name, file, list(folders)

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; empty if the file is not valid Python of this version."""
        try:
            return ast.parse(self.file.read_bytes()) if self.file else ast.Module([], [])
        except (SyntaxError, ValueError, OSError):
            return ast.Module([], [])

    @cached_property
    def names(self) -> dict[str, ast.AST]:
        """Top-level names: a class, a function, an import, or the expression that is assigned."""
        found: dict[str, ast.AST] = {}
        for name, node, unconditional in _bindings(self.tree.body):
            if unconditional or name not in found:
                found[name] = node
        return found

    @cached_property
    def star_imports(self) -> list[ast.ImportFrom]:
        """Its ``from … import *`` statements, but for those that only a type checker executes."""
        return [
            n for n in _runtime_statements(self.tree.body) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"
        ]

    @property
    def dynamic(self) -> bool:
        """True if the module may have names at run time that its source does not show."""
        if "__getattr__" in self.names or not self.tree.body:
            return bool(self.file)
        return any(isinstance(n, ast.Name) and n.id == "globals" for n in ast.walk(self.tree)) or any(
            isinstance(n, ast.Attribute) and n.attr == "modules" for n in ast.walk(self.tree)
        )

    def public(self) -> list[str]:
        """List names and submodules without a leading underscore."""
        files = {f.stem for folder in self.folders for f in folder.glob("*.py")}
        return sorted(name for name in {*self.names, *files} if not name.startswith("_") and name != "*")

    def submodule(self, part: str) -> SourceModule | None:
        """Return the module `part` of this package; None if it does not exist.

        Args:
            part: the last part of the submodule's dotted name.
        """
        return _submodule(self, part)

    def member(self, part: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition | SourceModule | None:
        """Look up the attribute `part` of this module, following imports and aliases."""
        step = (self.name, part)
        if step not in seen:
            seen |= {step}
            if part in self.names:
                found = self._bound(self.names[part], seen)
                if found is not None:
                    return found
            for star in self.star_imports:
                source = self._imported(star)
                found = source.member(part, seen) if source else None
                if found is not None:
                    return found
        return self.submodule(part)

    def resolve(
        self, expression: ast.expr, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Definition | SourceModule | None:
        """Resolve a name or attribute in this file."""
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
        """Return the module after ``from``, absolute or relative."""
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
    """Find a top-level module or package on Python's search path; None if it is not Python source.

    Args:
        name: the module's name, without dots.
    """
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
    """Find the module that an import statement imports; None if it is not Python source.

    Args:
        dotted: the module's dotted name.
    """
    first, *rest = dotted.split(".")
    found = top_level(first)
    for part in rest:
        found = found.submodule(part) if found else None
    return found


@cache
def lookup(dotted: str) -> Definition | SourceModule | None:
    """Find the module, class or function at a dotted path; None if the source does not show it.

    Args:
        dotted: the dotted path.
    """
    first, *rest = dotted.split(".")
    found: Definition | SourceModule | None = top_level(first)
    for part in rest:
        found = member(found, part)
    return found


def member(
    owner: Definition | SourceModule | None, part: str, seen: frozenset[tuple[str, str]] = frozenset()
) -> Definition | SourceModule | None:
    """Return the attribute `part` of a module or class; None if the source does not show it.

    Args:
        owner: the module or class; None for one that was not found.
        part: the attribute's name.
        seen: pairs of module and name on the way here, so that circular imports end.
    """
    if isinstance(owner, SourceModule):
        return owner.member(part, seen)
    if owner is not None and owner.is_class:
        for statement in reversed(owner.node.body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == part:
                return Definition(owner.module, statement, owner)
    return None


def ancestors(definition: Definition) -> Iterator[Definition | None]:
    """Yield a class and its bases depth first; None stands for a base that the source does not show.

    Args:
        definition: the class.
    """
    yield definition
    for base in definition.node.bases if definition.is_class else ():
        found = definition.module.resolve(base)
        if isinstance(found, Definition) and found.is_class:
            yield from ancestors(found)
        elif not (isinstance(base, ast.Name) and hasattr(builtins, base.id)):
            yield None


def derives(definition: Definition, base: Definition) -> bool | None:
    """Return True if a class is `base` or a subclass of it; None if the source does not show it.

    Args:
        definition: the class.
        base: the possible base class.
    """
    unknown = False
    for ancestor in ancestors(definition):
        if ancestor is None:
            unknown = True
        elif ancestor.dotted == base.dotted:
            return True
    return None if unknown else False


def parse_expression(text: str) -> ast.expr:
    """Parse an annotation given as text; the constant None if it is not valid Python.

    Args:
        text: a Python expression.
    """
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return ast.Constant(None)


def _bindings(body: Iterable[ast.stmt], unconditional: bool = True) -> Iterator[tuple[str, ast.AST, bool]]:
    """Yield the names that statements bind; names of a second branch are conditional and never hide an earlier one."""
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            yield statement.name, statement, unconditional
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                # `import a.b` binds a; `import a.b as c` binds c to a.b
                one = alias if alias.asname else ast.alias(alias.name.partition(".")[0])
                yield alias.asname or one.name, ast.Import([one]), unconditional
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield (
                    alias.asname or alias.name,
                    ast.ImportFrom(statement.module, [alias], statement.level),
                    unconditional,
                )
        elif isinstance(statement, ast.If):
            yield from _bindings(statement.body, unconditional)
            yield from _bindings(statement.orelse, False)
        elif isinstance(statement, ast.Try):
            yield from _bindings([*statement.body, *statement.orelse, *statement.finalbody], unconditional)
            for handler in statement.handlers:
                yield from _bindings(handler.body, False)
        elif isinstance(statement, ast.With):
            yield from _bindings(statement.body, unconditional)
        else:
            target, value = _assignment(statement)
            if target and value is not None:
                yield target, value, unconditional


def _runtime_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield top-level statements and those in branches of if and try, without ``if TYPE_CHECKING`` blocks."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try) and last_name(getattr(statement, "test", None)) != "TYPE_CHECKING":
            yield from _runtime_statements([*statement.body, *statement.orelse])
        else:
            yield statement


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """Return the name and value of ``name = value`` and ``name: type = value``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    return None, None


def last_name(node: ast.AST | None) -> str:
    """Return ``"dataclass"`` for ``@dataclass``, ``@dataclasses.dataclass`` and ``@dataclass(frozen=True)``.

    Args:
        node: an expression; None has the empty name.
    """
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
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
