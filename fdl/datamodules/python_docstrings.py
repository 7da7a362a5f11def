"""Language data that every machine with Python has: the documentation in the source of installed packages."""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdl.datamodules.language import Documents, LanguageDataModule
from fdl.datamodules.records import UNPAIRED
from fdl.errors import UserError

_SHORTEST = 40
"""Minimum number of characters: shorter docstrings carry little information, and often repeat."""

_LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}


class PythonDocstrings(LanguageDataModule):
    """Docstrings of installed Python packages, each package an institution with its own topic.

    The docstring of a module, class or function is a document, its package the group, so that
    ``partition: by_group`` gives every client whole packages. Nothing is imported: source files are parsed, public
    modules first, in the order of their names, until the limit of the package is reached. A text that occurs twice
    counts once, and as public where one of the places is. Tests are left out.

    Args:
        packages: the private packages by the names that Python imports them by, e.g. ``numpy`` or ``sklearn.cluster``;
            ``stdlib`` is Python's own library.
        context: tokens of a window.
        proxy_packages: packages of which the docstrings are the public proxy set.
        limit_bytes: most bytes of a package's text, in UTF-8; the docstring that would exceed it ends its part.
        test: number or fraction of the private docstrings held out for the report.
        common: the other arguments of `LanguageDataModule`.

    Raises:
        UserError: when a package is not installed, or named twice; from `setup` when it has no docstrings.
    """

    name = "python_docstrings"

    def __init__(
        self,
        packages: list[str],
        context: int,
        proxy_packages: list[str] | None = None,
        limit_bytes: int = 500_000,
        test: int | float | None = 0.1,
        **common: Any,
    ):
        public = list(proxy_packages or [])
        super().__init__(context=context, proxy_groups=public, test=test, **common)
        if not packages:
            raise UserError("packages must name at least one package")
        if limit_bytes < 1:
            raise UserError(f"limit_bytes must be at least 1, got {limit_bytes}")
        names = [*public, *packages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"packages: {twice!r} is named twice in packages and proxy_packages")
        self._places = {name: _located(name) for name in names}
        self._limit_bytes = limit_bytes

    def documents(self) -> dict[str, Documents]:
        """Collect the docstrings, those of public packages first."""
        documents, seen = Documents(), set()
        for package, place in self._places.items():
            texts, left = [], self._limit_bytes
            for text in _docstrings(place):
                if text in seen:
                    continue
                left -= len(text.encode())
                if left < 0:
                    break
                seen.add(text)
                texts.append(text)
            if not texts:
                raise UserError(f"{self.name}: {package} has no docstrings of {_SHORTEST} characters or more ({place})")
            documents.add(texts, package)
        return {"train": documents}


def _located(name: str) -> Path:
    """The folder, or the one file, with the source of a package; nothing is imported."""
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"packages: {first!r} is not installed here")
    if spec.submodule_search_locations:
        place = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
        place = place if place.is_dir() else place.with_name(f"{place.name}.py")
    else:
        place = Path(spec.origin or "").joinpath(*rest)
    if not place.is_dir() and (place.suffix != ".py" or not place.is_file()):
        raise UserError(f"packages: {name!r} has no Python source here")
    return place


def _docstrings(place: Path) -> Iterator[str]:
    """All docstrings that are long enough, file by file, in the order of their lines."""
    for file in sorted(_sources(place), key=_order) if place.is_dir() else [Path()]:
        try:
            source = (place / file).read_bytes()
            if b'"""' not in source and b"'''" not in source:
                continue  # parsing is what takes the time
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in others' strings
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue  # templates and examples of mistakes
        yield from _of(tree)


def _sources(folder: Path) -> Iterator[Path]:
    """The source files below a folder, relative to it; what is left out is not entered, as it may be large."""
    for here, folders, files in os.walk(folder):
        folders[:] = set(folders) - _LEFT_OUT
        yield from (Path(here, file).relative_to(folder) for file in files if file.endswith(".py"))


def _order(file: Path) -> tuple[bool, tuple[str, ...]]:
    """Return a sort key with public modules first: internal ones carry less information in more lines."""
    return any(part[0] == "_" and part != "__init__.py" for part in file.parts), file.parts


def _of(node: ast.AST) -> Iterator[str]:
    """The docstrings of a node and of all definitions in its body."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node) or ""
        if len(text) >= _SHORTEST and UNPAIRED.isdisjoint(text):
            yield text
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for part in ("body", "orelse", "handlers", "finalbody"):
            for inner in getattr(node, part, []):
                yield from _of(inner)
