"""``key=value`` overrides, which also reach into lists and components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fdl.errors import UserError


@dataclass(frozen=True)
class Override:
    """One change to a recipe.

    Attributes:
        key: dotted path, with numbers for the entries of lists.
        value: the new value.
        text: the override as the user wrote it.
    """

    key: str
    value: Any
    text: str

    @classmethod
    def parse(cls, text: str) -> Override:
        """Parse ``key=value``; the value is YAML.

        Args:
            text: the override as the user wrote it.

        Raises:
            UserError: the key or ``=`` is missing, or the value is not valid YAML.

        Example:
            >>> override = Override.parse("optim.args.lr=0.01")
            >>> override.parts, override.value
            (['optim', 'args', 'lr'], 0.01)
        """
        key, equals, value = text.partition("=")
        key = key.strip()
        if text.startswith("-"):
            bare = key.lstrip("-").replace("-", "_")
            raise UserError(f"override {text!r}: overrides have no dashes, write {bare}={value or '…'}")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {text!r}: expected key=value, such as federation.rounds=10")
        try:
            return cls(key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"], text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
            raise UserError(f"override {text!r}: the value is not valid YAML: {reason}") from error

    @property
    def parts(self) -> list[str]:
        """The steps of the path; the dotted keys of a variant are one step."""
        parts = self.key.split(".")
        return [*parts[:3], ".".join(parts[3:])] if parts[:2] == ["compare", "variants"] and parts[4:] else parts


def apply(tree: dict[str, Any], overrides: Iterable[Override]) -> list[tuple[str, str]]:
    """Apply overrides in order, in place.

    A mapping is merged into a section; lists, components that name their target, and `args` are replaced as a whole. A
    new `target` drops the arguments of the old one, but not those that an earlier override gave.

    Args:
        tree: plain dicts and lists.
        overrides: the changes; later ones take precedence.

    Returns:
        Pairs of key and problem, for overrides that could not be applied.
    """
    problems = []
    touched: set[str] = set()
    for override in overrides:
        try:
            _apply(tree, override, touched)
        except UserError as error:
            problems.append((override.key, str(error)))
        touched.add(override.key)
    return problems


def _apply(tree: dict[str, Any], override: Override, touched: set[str]) -> None:
    *parents, last = override.parts
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _step(node, part, override.parts[depth + 1], ".".join(parents[:depth]))
    where = ".".join(parents)
    if isinstance(node, list):
        node[_index(node, last, where)] = override.value
        return
    value = override.value
    if isinstance(value, Mapping) and "target" not in value and isinstance(node.get(last), Mapping) and last != "args":
        for name, inner in value.items():
            _apply(tree, Override(f"{override.key}.{name}", inner, override.text), touched)
        return
    if last == "target" and "args" in node and node.get("target") != override.value:
        kept = node["args"] if f"{where}.args" in touched else {}
        for name, value in (node["args"] or {}).items():
            if any(t == f"{where}.args.{name}" or t.startswith(f"{where}.args.{name}.") for t in touched):
                kept = {**kept, name: value}
        node["args"] = kept
    node[last] = override.value


def _step(node: Any, part: str, following: str, where: str) -> Any:
    """Descend one level, to a mapping or a list."""
    if isinstance(node, list):
        slot: Any = _index(node, part, where)
        value = node[slot]
    else:
        slot, value = part, node.get(part)
    if isinstance(value, str) and not value.startswith("${") and following in ("target", "args"):
        value = {"target": value, "args": {}}  # the short form of a component
    if value is None:
        value = {}
    key = f"{where}.{part}" if where else part
    if not isinstance(value, dict | list):
        raise UserError(f"{key} is {value!r}, which has no {following!r} inside")
    node[slot] = value
    return value


def _index(node: list[Any], part: str, where: str) -> int:
    entries = f"{where} is a list of {len(node)}"
    if not part.isdigit():
        raise UserError(f"{entries}: name an entry by its number, such as {where}.0")
    if int(part) >= len(node):
        raise UserError(f"{entries}: there is no entry {part}, they count from 0")
    return int(part)
