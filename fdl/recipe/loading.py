"""Loading of recipes, YAML files that describe an experiment completely.

`load` reads it, applies overrides, and reports everything that is wrong at once, before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fdl.errors import RecipeError, UserError
from fdl.recipe import cross_checks as rules
from fdl.recipe.config import Fit, Recipe, Scheduler
from fdl.recipe.overrides import Override, apply
from fdl.recipe.renamed import explain
from fdl.recipe.validate import check, fill
from fdl.registry.checking import ConfigChecker
from fdl.registry.component import Component
from fdl.registry.instantiate import instantiate
from fdl.registry.static_source import SourceModule
from fdl.utils.paths import expanded
from fdl.utils.suggest import suggest

__all__ = ["Component", "Fit", "Recipe", "Scheduler", "difference", "from_mapping", "instantiate", "load"]


def load(path: str | Path, overrides: Sequence[str] = (), variant: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a YAML file.
        overrides: ``key=value`` strings; the later wins.
        variant: changes that come before the overrides, by dotted key; the recipe's other variants are not checked.

    Raises:
        UserError: the file does not exist or cannot be read.
        RecipeError: the recipe is invalid; lists all its problems.
    """
    path = expanded(path)
    try:
        text = path.read_text(encoding="utf-8")
        config, lines = OmegaConf.load(path), _lines(text)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: there is no such recipe file{_near_file(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where, hint = "", ""
        if mark is not None:
            where = f" in line {mark.line + 1}, column {mark.column + 1}"
            before = "".join(text.split("\n")[mark.line : mark.line + 1])[: mark.column + 1]
            hint = "; this is a tab, and YAML is indented with spaces" if "\t" in before else ""
        raise RecipeError(str(path), [f"not valid YAML{where}: {getattr(error, 'problem', error)}{hint}"]) from error
    except OmegaConfBaseException as error:
        raise RecipeError(str(path), [f"{_plain_key(error.full_key)}: {_first_line(error)}"]) from error
    tree = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else None
    if tree is None:
        raise RecipeError(str(path), ["expected a mapping of keys to values"])
    return from_mapping(tree, overrides, variant, str(path), path.stem, lines)


def from_mapping(
    tree: Mapping[str, Any],
    overrides: Sequence[str] = (),
    variant: Mapping[str, Any] | None = None,
    source: str = "recipe",
    name: str = "run",
    lines: Mapping[str, int] | None = None,
) -> Recipe:
    """Check a recipe given as plain dicts and lists.

    Args:
        tree: the content of a YAML file.
        overrides: ``key=value`` strings; the later wins.
        variant: changes that come before the overrides, by dotted key.
        source: the recipe's name in messages.
        name: the run's name if the recipe gives none.
        lines: line numbers by key, for messages.

    Raises:
        RecipeError: the recipe is invalid; lists all its problems.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides: expected a list of key=value strings, got a string; write [{overrides!r}]")
    problems: list[str] = []
    parsed = []
    for text in overrides:
        try:
            parsed.append(Override.parse(text))
        except UserError as error:
            problems.append(str(error))
    changes = _changes(variant)
    raw, found = _applied(tree, [*changes, *parsed])
    checked, more = _checked(raw, name)
    found += [one for one in more if one not in found]
    # given one variant, the whole recipe was read before, and the other variants were checked then
    for variant_name, mapping in _variants(raw) if variant is None else ():
        inside, broken = _applied(tree, [*_changes(mapping), *parsed])
        broken += _checked(inside, name)[1]
        # `fdl compare` reports overrides that are invalid for a variant; a single fit is no variant
        if broken and parsed:
            alone, wrong = _applied(tree, _changes(mapping))
            wrong += _checked(alone, name)[1]
            broken = [problem for problem in broken if problem in wrong]
        where = f"compare.variants.{variant_name}"
        found += [(where, f"{k}: {message}") for k, message in dict.fromkeys(broken) if (k, message) not in found]
    if found or problems:
        raise RecipeError(source, problems + [_located(k, message, parsed, lines or {}) for k, message in found])
    return _structured(checked)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """List the dotted keys in which two recipes, given as plain dicts, differ.

    Args:
        a: a recipe.
        b: another recipe.

    Example:
        >>> difference({"seed": 0, "data": {"target": "digits"}}, {"seed": 1, "data": {"target": "digits"}})
        ['seed']
    """
    flat_a, flat_b = _flat(a), _flat(b)
    return [k for k in dict.fromkeys([*flat_a, *flat_b]) if flat_a.get(k, _ABSENT) != flat_b.get(k, _ABSENT)]


_ABSENT = object()
_LONGEST = 200
"""Longest excerpt of an override in a message, in characters."""
_MODULE = SourceModule(__name__, Path(__file__))
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Omegaconf's parser: the pure Python parser refuses tabs that this one and YAML allow."""


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for k, v in pairs:
        flat.update(_flat(v, f"{prefix}.{k}" if prefix else str(k)))
    return flat or {prefix: type(value)()}


def _changes(variant: Mapping[str, Any] | None) -> list[Override]:
    return [Override(str(k), _plain(v), f"{k}: {v}") for k, v in (variant or {}).items()]


def _applied(tree: Mapping[str, Any], overrides: list[Override]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the filled tree with overrides, and problems of overrides that could not be applied."""
    filled = fill(_plain(tree), Recipe)
    problems = apply(filled, overrides)
    return filled, problems


def _variants(raw: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    compare = raw.get("compare")
    variants = compare.get("variants") if isinstance(compare, Mapping) else None
    pairs = variants.items() if isinstance(variants, Mapping) else ()
    return [(str(name), mapping) for name, mapping in pairs if isinstance(mapping, Mapping)]


def _checked(raw: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Resolve interpolations and check everything; returns the complete tree, and problems by key."""
    resolved, problems = _interpolated(raw)
    for part in ("student", "teacher"):  # "${specialists.0}" refers to the model, not to its clients
        if isinstance(raw.get(part), str) and isinstance(resolved.get(part), Mapping):
            resolved[part] = {k: v for k, v in resolved[part].items() if k in ("target", "args")}
    checker = ConfigChecker()
    tree = check(fill(resolved, Recipe), Recipe, _MODULE, checker)
    broken = {k for k, _ in problems}
    problems += [(k, m) for k, m in checker.problems if not any(k == b or k.startswith(f"{b}.") for b in broken)]
    if "name" in tree:
        tree["name"] = tree["name"] or name
    problems = [(k, explain(k, m, resolved)) for k, m in problems]
    problems += rules.violations(tree, {k for k, _ in problems})
    return tree, problems


def _interpolated(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    if not _interpolates(raw):  # most recipes: their conversion to omegaconf's nodes takes longer than all checks
        return _plain(raw), []
    config = OmegaConf.create(dict(raw))
    problems: list[tuple[str, str]] = []
    while True:
        try:
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=False), problems
        except OmegaConfBaseException as error:
            problems.append((_plain_key(error.full_key), _first_line(error)))
            OmegaConf.update(config, error.full_key, None)


def _interpolates(value: Any) -> bool:
    """Return True if a string anywhere in a tree refers to another key."""
    if isinstance(value, Mapping):
        return any(map(_interpolates, value.values()))
    return (
        any(map(_interpolates, value)) if isinstance(value, list | tuple) else isinstance(value, str) and "${" in value
    )


def _structured(tree: Mapping[str, Any]) -> Recipe:
    """Convert a tree to the dataclass by omegaconf's structured config."""
    config = OmegaConf.structured(Recipe)
    for part in ("local_training", "server_distil"):
        OmegaConf.set_readonly(config[part], False)  # omegaconf makes frozen dataclasses read-only
        config[part].optimizer.args = {}  # mappings merge: the default's arguments would stay
    return OmegaConf.to_object(OmegaConf.merge(config, tree))


def _plain(value: Any) -> Any:
    """Return a deep copy that overrides may change."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _lines(text: str) -> dict[str, int]:
    """Return the line number of every key in a YAML text."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                path = f"{prefix}.{name.value}" if prefix else str(name.value)
                lines[path] = name.start_mark.line + 1
                walk(value, path)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[f"{prefix}.{i}"] = value.start_mark.line + 1
                walk(value, f"{prefix}.{i}")

    walk(yaml.compose(text, Loader=_LOADER), "")
    return lines


def _located(where: str, message: str, overrides: Sequence[Override], lines: Mapping[str, int]) -> str:
    """Append the override or line that caused a problem to its message."""
    for override in reversed(overrides):
        # a problem of a component as a whole is a problem of its target
        if where == override.key or override.key == f"{where}.target" or where.startswith(f"{override.key}."):
            return f"{where}: {message} (from the override {override.text[:_LONGEST]!r})"
    for override in reversed(overrides):
        if where not in lines and override.key.startswith(f"{where}."):  # this override created the section
            return f"{where}: {message} (from the override {override.text[:_LONGEST]!r})"
    parent = where
    while parent and parent not in lines:
        parent = parent.rpartition(".")[0]
    return f"{where}: {message}" + (f" (line {lines[parent]})" if parent else "")


def _near_file(path: Path) -> str:
    """Suggest existing recipes with a similar name."""
    known = {p.name: p for folder in (path.parent, Path("recipes")) for p in folder.glob("*.yaml")}
    near = suggest(path.name, known, few=0) or suggest(f"{path.name}.yaml", known, few=0)
    for name, found in known.items():
        if f"{name!r}" in near:
            return f"; did you mean {found}?"
    return f"; there are {', '.join(str(p) for p in sorted(known.values()))}" if 0 < len(known) <= 8 else ""


def _plain_key(full_key: str | None) -> str:
    """Turn omegaconf's ``specialists[0].args`` into ``specialists.0.args``."""
    return re.sub(r"\[(\w+)\]", r".\1", full_key or "").lstrip(".")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
