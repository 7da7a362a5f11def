"""Recipe keys that a resumed run may change; this module does not import torch."""

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
"""Keys that a resumed run may change, since callbacks and hardware do not affect its results.

`evaluation.batch_size` is the batch size of inference only, and `data.args.batch_size` applies to a plain Trainer.
"""

EVALUATION_KEYS = ("evaluation.metrics", "evaluation.evaluators", "evaluation.attacks", "evaluation.specialists")
"""Keys of the evaluation of future rounds, which a resumed run may change if it has rounds left."""

_PLACE = re.compile(r"data\.(?:args\.proxy\.)*args\.(\w+)(?:\.\d+)?")
_PLACES = {"path", "paths", "root", "folder", "file"}


def changes(stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys that make two recipes different experiments, judging by the recipes alone.

    Args:
        stored: the recipe of a run.
        recipe: the new recipe.
    """
    return [key for key in difference(stored, recipe) if not is_within(key, RESUMABLE_KEYS)]


def is_within(key: str, sections: Iterable[str]) -> bool:
    """Check if a dotted key is one of some sections, or lies below one of them.

    Args:
        key: the key.
        sections: dotted keys.
    """
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def is_location(key: str, before: Any, after: Any) -> bool:
    """Check if a key only gives the location of data, so that only the data themselves show if they are the same.

    Args:
        key: dotted, e.g. ``data.args.path``.
        before: its value in one recipe.
        after: its value in the other.
    """
    match = _PLACE.fullmatch(key)
    if match is None or not (isinstance(before, str) and isinstance(after, str)):
        return False
    return match[1] in _PLACES or "/" in before or "/" in after


def value_at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key of a recipe.

    Args:
        tree: the recipe as nested mappings and lists.
        key: the key.

    Raises:
        KeyError: the recipe does not have the key.
    """
    for part in key.split("."):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise KeyError(key) from None
    return tree


def location_keys(stored: Mapping[str, Any], recipe: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Select the changed keys that only give the location of data.

    Args:
        stored: the recipe of a run.
        recipe: the new recipe.
        keys: dotted keys in which they differ.
    """
    found = []
    for key in keys:
        try:
            if is_location(key, value_at(stored, key), value_at(recipe, key)):
                found.append(key)
        except KeyError:
            continue
    return found


def format_differences(stored: Mapping[str, Any], recipe: Mapping[str, Any], keys: list[str], most: int = 10) -> str:
    """Format the differences between a stored recipe and a new one, one line per key.

    Args:
        stored: the recipe of a run.
        recipe: the new recipe.
        keys: dotted keys in which they differ.
        most: maximum number of keys to list.
    """
    lines = [f"  - {key}: {_shown(stored, key)} there, {_shown(recipe, key)} here" for key in keys[:most]]
    return "\n".join(lines + ([f"  - and {len(keys) - most} more"] if len(keys) > most else []))


def _shown(tree: Any, key: str) -> str:
    try:
        value = value_at(tree, key)
    except KeyError:
        return "absent"
    return "null" if value is None else repr(value)
