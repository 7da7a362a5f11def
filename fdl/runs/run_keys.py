"""Which keys of a recipe a run may change when it goes on. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fdl.recipe.loading import difference

RESUMABLE_KEYS = (
    "name",
    "output_dir",
    "callbacks",
    "checkpoint",
    "compare",
    "client_execution",
    "inference",
    "profile",
    "federation.client_state",
    "evaluation.batch_size",
    "fabric.accelerator",
    "fabric.devices",
    "fabric.num_nodes",
    "fabric.strategy",
    "fabric.timeout",
    "local_training.compile",
    "server_distil.compile",
    "client_distil.compile",
    "data.args.batch_size",
)
"""A run may go on with other values here: where and how it is watched and computed does not change what it computes.

`evaluation.batch_size` is how many samples a model answers at once, and `data.args.batch_size` is for a plain Trainer.
"""

MEASURED = ("evaluation.metrics", "evaluation.evaluators", "evaluation.attacks", "evaluation.specialists")
"""What coming rounds are measured by: a run that has rounds to go may go on with other values here."""

_PLACE = re.compile(r"data\.(?:args\.proxy\.)*args\.(\w+)(?:\.\d+)?")
_PLACES = {"path", "paths", "root", "folder", "file"}


def changes(stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Keys, dotted, that make two recipes different experiments, as far as the recipes alone can tell."""
    return [key for key in difference(stored, recipe) if not within(key, RESUMABLE_KEYS)]


def within(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or below one of them."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def is_place(key: str, before: Any, after: Any) -> bool:
    """Whether a key only says where data lie, so that it takes the data themselves to know whether they are the same.

    Args:
        key: dotted, e.g. ``data.args.path``.
        before: its value in one recipe.
        after: its value in the other.
    """
    match = _PLACE.fullmatch(key)
    if match is None or not (isinstance(before, str) and isinstance(after, str)):
        return False
    return match[1] in _PLACES or "/" in before or "/" in after


def at(tree: Any, key: str) -> Any:
    """The value at a dotted key of a recipe.

    Raises:
        KeyError: there is none.
    """
    for part in key.split("."):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise KeyError(key) from None
    return tree


def places(stored: Mapping[str, Any], recipe: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of some keys in which two recipes differ that only say where data lie."""
    found = []
    for key in keys:
        try:
            if is_place(key, at(stored, key), at(recipe, key)):
                found.append(key)
        except KeyError:
            continue
    return found


def told(stored: Mapping[str, Any], recipe: Mapping[str, Any], keys: list[str], most: int = 10) -> str:
    """Lines for a message that tell what differs between a stored recipe and the one at hand."""
    lines = [f"  - {key}: {_shown(stored, key)} there, {_shown(recipe, key)} here" for key in keys[:most]]
    return "\n".join(lines + ([f"  - and {len(keys) - most} more"] if len(keys) > most else []))


def _shown(tree: Any, key: str) -> str:
    try:
        value = at(tree, key)
    except KeyError:
        return "absent"
    return "null" if value is None else repr(value)
