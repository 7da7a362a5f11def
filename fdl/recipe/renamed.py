"""Former names of keys, values and plug-ins, so that an older recipe gets an error that names the new one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

KEYS = {
    "local": "local_training",
    "distil": "server_distil",
    "digest": "client_distil",
    "executor": "client_execution",
    "output": "output_dir",
    "federation.participation": "federation.client_fraction",
    "federation.calibration": "federation.calibration_fraction",
    "federation.state": "federation.client_state",
    "channel.limit": "channel.max_message_bytes",
    "evaluation.probes": "evaluation.evaluators",
    "adversaries.*.share": "adversaries.*.fraction",
    "privacy.exhausted": "privacy.on_exhausted",
    "privacy.ghost": "privacy.ghost_clipping",
    "privacy.chunk": "privacy.max_physical_batch",
}
"""New key by former key; ``*`` stands for the number of a list's entry."""

VALUES = {
    ("client_execution", "batched"): "vectorized",
    ("privacy.on_exhausted", "client"): "stop_client",
    ("privacy.on_exhausted", "run"): "stop_run",
}
"""New value by key and former value."""

NAMES = {
    ("fault", "vanish"): "dropout",
    ("fault", "straggle"): "straggler",
    ("fault", "not_finite"): "nan_upload",
    ("adversary", "lma"): "least_likely",
    ("adversary", "cpa"): "class_confusion",
    ("adversary", "hips"): "worst_replay",
    ("adversary", "random"): "random_class",
    ("adversary", "silent"): "non_response",
    ("module", "image_classifier"): "custom",
    ("phase_schedule", "never"): "single_phase",
    ("phase_schedule", "fixed"): "fixed_phases",
    ("feature_transfer", "features"): "feature_transfer",
    ("layer_selection", "selection"): "layer_selection",
    ("prototype_transfer", "prototypes"): "prototype_transfer",
    ("client_weighting", "adaptive"): "adaptive_client_weights",
    ("personalization", "similarity"): "similarity_mixture",
}
"""New short name by kind of plug-in and former short name."""

_UNKNOWN_NAME = re.compile(r"unknown (?P<kind>[\w ]+) '(?P<name>\w+)'")
_INTERPOLATION = re.compile(r"Interpolation key '(?P<key>[\w.\[\]]+)' not found")


def explain(key: str, message: str, tree: Mapping[str, Any]) -> str:
    """Return a problem's message, with the new name if the recipe uses a former one.

    Args:
        key: the full dotted key of the problem.
        message: the problem.
        tree: the recipe as plain dicts and lists.
    """
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", key)
    if pattern in KEYS:
        number = re.search(r"\.(\d+)\.", key)
        return f"unknown key; it is called {KEYS[pattern].replace('*', number[1] if number else '*')}"
    if (value := VALUES.get((pattern, _at(tree, key)))) is not None:
        return f"unknown value {_at(tree, key)!r}; it is called {value!r}"
    if (found := _UNKNOWN_NAME.match(message)) and (new := NAMES.get((found["kind"].replace(" ", "_"), found["name"]))):
        return f"{found[0]}; it is called {new!r}"
    if found := _INTERPOLATION.match(message):
        for former, new in KEYS.items():
            if f"{found['key']}.".startswith(f"{former}."):
                return f"{message}; {former} is called {new}"
    return message


def _at(tree: Any, key: str) -> Any:
    """Return the string at a dotted key; None for any other value."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, str) else None
