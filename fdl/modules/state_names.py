"""Mapping of the names in files of other training programs to the names of a network."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fdl.errors import UserError

log = logging.getLogger("fdl")

CONTAINERS = (
    "state_dict_ema",
    "model_ema_state_dict",
    "ema_state_dict",
    "model_ema",
    "params_ema",
    "ema_model",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "backbone",
    "encoder",
    "student",
)
"""Keys under which training scripts store weights; averaged weights come first, as in timm."""

_WRAPPERS = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# `module` may also be a submodule of the network itself, so only the other names are removed within a name
_INNER = re.compile(r"(?<=\.)(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def find_state_dict(found: Any) -> dict[str, Tensor]:
    """Find the named tensors in the content of a training script's checkpoint.

    Args:
        found: content of the file: tensors by name, or a mapping that contains such a mapping, at any depth, under one
            of the keys in `CONTAINERS` or as the only one. All other entries are ignored.

    Returns:
        Tensors by name; empty if the file has none, or several sets under unknown keys.
    """
    if not isinstance(found, Mapping):
        return {}
    for key in CONTAINERS:
        if isinstance(found.get(key), Mapping) and (inside := find_state_dict(found[key])):
            return inside
    own = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if own:
        return own
    # optimiser states, which also contain tensors, are excluded by their keys
    others = [
        inside
        for name, value in found.items()
        if isinstance(name, str) and not name.startswith(("optimizer", "lr_scheduler", "callbacks", "loops"))
        if (inside := find_state_dict(value))
    ]
    return others[0] if len(others) == 1 else {}


def strip_wrapper_prefixes(
    weights: Mapping[str, Tensor], wanted: Collection[str], path: str | Path
) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers add to a network's names, and log the removed prefix.

    DistributedDataParallel, torch.compile, FSDP and Fabric add prefixes in any order; a LightningModule adds the name
    of the attribute, and contains other parts besides the network, which are dropped.

    Args:
        weights: tensors by the file's names.
        wanted: names of the network's state dict.
        path: path of the file, for messages.

    Returns:
        The weights under the prefix with which most of the network's names are found; unchanged if no prefix matches.

    Raises:
        UserError: several parts of the file match equally well, and not exactly one of them is an average.
    """
    wanted = set(wanted)
    inner = {_INNER.sub("", name): value for name, value in weights.items()}
    weights = inner if len(inner) == len(weights) and not wanted & (weights.keys() - inner.keys()) else dict(weights)
    scores: dict[str, int] = {}
    for name in weights:
        parts = name.split(".")
        for depth in range(len(parts)):
            rest = ".".join(parts[depth:])
            if rest in wanted:
                prefix = name.removesuffix(rest)
                scores[prefix] = scores.get(prefix, 0) + 1
    best = max(scores.values(), default=0)
    if best * 4 < len(wanted) or not best:  # a few matching names mean nothing: parts of different networks share names
        return _strip_known_wrappers(weights, path)
    if scores.get("", 0) == best:
        return weights
    prefixes = sorted((prefix for prefix, score in scores.items() if score == best), key=len)
    averaged = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)]
    if len(prefixes) > 1 and len(averaged) != 1:
        raise UserError(
            f"checkpoint: {path} has weights that fit under {' and under '.join(map(repr, prefixes))}; save those that "
            "are meant in a file of their own"
        )
    return _strip_prefix((averaged or prefixes)[0], weights, path)


def describe_mismatch(weights: Iterable[str], wanted: Iterable[str]) -> str:
    """Describe how a file's names differ from a network's.

    Args:
        weights: names in the file, after `strip_wrapper_prefixes`.
        wanted: names of the network's state dict.

    Returns:
        A sentence with up to three missing and three unexpected names, and the likely cause; empty if the names are
        equal.
    """
    weights, wanted = list(weights), list(wanted)
    present, expected = set(weights), set(wanted)
    missing = [name for name in wanted if name not in present]
    extra = [name for name in weights if name not in expected]
    if not missing and not extra:
        return ""
    differences = [
        f"{len(names)} of {total} names {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for word, names, total in (("missing", missing, len(wanted)), ("unexpected", extra, len(weights)))
        if names
    ]
    if len(missing) == len(expected):
        hint = "no name fits: these are weights of another architecture, or a wrapper renamed them"
    elif not extra:
        hint = "the file holds only a part of the network"
    else:
        hint = "the file was made by another architecture, or another size or version of this one"
    return f"{' and '.join(differences)}; {hint}"


def _strip_known_wrappers(weights: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Remove the prefixes of known wrappers, for networks whose library renames the weights that it loads."""
    prefix, names = "", list(weights)
    while True:
        first = {name.removeprefix(prefix).partition(".")[0] for name in names}
        if len(first) != 1 or next(iter(first)) not in (*_WRAPPERS, "backbone"):
            break
        if any("." not in name.removeprefix(prefix) for name in names):
            break
        prefix += f"{first.pop()}."
    return _strip_prefix(prefix, weights, path) if prefix else weights


def _strip_prefix(prefix: str, weights: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    kept = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    rest = len(weights) - len(kept)
    dropped = f"; dropped {rest} names without it" if rest else ""
    log.info("checkpoint: %s: removed the prefix %r from %d names%s", path, prefix, len(kept), dropped)
    return kept
