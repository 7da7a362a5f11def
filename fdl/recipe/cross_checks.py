"""Cross-field checks of a recipe: combinations of keys that are invalid together.

A rule applies to keys that are valid by themselves and reports nothing if one of them is not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from fdl.comm.bandwidth import Bandwidth
from fdl.errors import UserError
from fdl.metrics.tasks import TASKS
from fdl.recipe.learning_rates import rates_by_client
from fdl.registry.instantiate import instantiate
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names
from fdl.registry.targets import find
from fdl.utils.suggest import suggest

Problems = list[tuple[str, str]]

PROXY = "a number of training samples or a share such as 0.3, which are held out for it, or another data set"
"""Forms of a proxy set, for messages."""

_LONGEST_NAME = 200
"""File systems allow 255 bytes, and files of a run append to its name."""
_FITS = ("local_training", "server_distil", "client_distil")


def violations(tree: dict[str, Any], known: set[str]) -> Problems:
    """Apply all rules.

    Args:
        tree: a filled recipe without interpolations, each of its keys checked.
        known: keys already known to be wrong.

    Returns:
        Pairs of key and problem.
    """
    problems: Problems = []
    sections = {key.partition(".")[0] for key in known}
    for rule in (
        _name,
        _fits,
        _cohort,
        _links,
        _keys,
        _faults,
        _required_parts,
        _proxy,
        _assigned,
        _rates,
        _dishonest,
        _outvoted,
        _metrics,
        _private,
        _comparison,
        _compiled,
        _sharded,
    ):
        problems += rule(tree, sections)
    return problems + _constructed(tree, known | {key for key, _ in problems})


def _name(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require names of runs and variants that are valid names of folders."""
    if "name" in broken:
        return []
    variants = (tree.get("compare") or {}).get("variants", {}) if "compare" not in broken else {}
    named = {"name": tree["name"], **{f"compare.variants.{v}": v for v in variants}}
    problems = [
        (k, f"{v!r} names a folder: letters, digits, '.', '_', '+' and '-' only, not beginning with a dot")
        for k, v in named.items()
        if not re.fullmatch(r"[\w+-][\w.+-]*", str(v))
    ]
    sizes = {k: len(str(v).encode()) for k, v in named.items()}
    return problems + [
        (k, f"names a folder, and has {size} bytes; at most {_LONGEST_NAME}, please")
        for k, size in sizes.items()
        if size > _LONGEST_NAME
    ]


def _fits(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require epochs or steps, not both."""
    return [
        (part, f"give epochs or steps, not both; to count steps, set {part}.epochs to null")
        for part in _FITS
        if part not in broken and tree[part] and None not in (tree[part]["epochs"], tree[part]["steps"])
    ]


def _cohort(tree: dict[str, Any], broken: set[str]) -> Problems:
    if "federation" in broken:
        return []
    clients, fraction = tree["federation"]["clients"], tree["federation"]["client_fraction"]
    if int(fraction * clients + 0.5) >= 1:
        return []
    message = f"{fraction:g} of {clients} clients selects nobody; {1 / clients:.2g} selects one"
    return [("federation.client_fraction", message)]


def _assigned(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require that clients of specialists exist, each in one entry, and that every client has a model."""
    if broken & {"specialists", "federation"} or not tree["specialists"]:
        return []
    count, owner, problems = tree["federation"]["clients"], {}, []
    for i, entry in enumerate(tree["specialists"]):
        for client in entry["clients"] or ():
            where = f"specialists.{i}.clients"
            if not 0 <= client < count:
                problems.append((where, f"there is no client {client}: the ids are 0 … {count - 1}"))
            elif client in owner:
                problems.append((where, f"client {client} has specialists.{owner[client]} already"))
            owner.setdefault(client, i)
    left = [client for client in range(count) if client not in owner]
    if left and all(entry["clients"] is not None for entry in tree["specialists"]):
        problems.append(("specialists", f"every entry names its clients, and none names client {left[0]}"))
    return problems


def _rates(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require that learning rates are of existing clients and that the optimiser has a learning rate."""
    if broken & {"specialists", "federation", "local_training"}:
        return []
    try:
        own = rates_by_client(tree["federation"]["learning_rates"])
    except UserError as error:
        where, _, message = str(error).partition(": ")
        return [(f"federation.{where}", message)]
    count = tree["federation"]["clients"]
    given = [f"federation.learning_rates.{client}" for client in own]
    given += [f"specialists.{i}.lr" for i, entry in enumerate(tree["specialists"]) if entry["lr"] is not None]
    if given:
        optimizer = tree["local_training"]["optimizer"]["target"]
        taken = find(optimizer, KINDS["optimizer"]).signature
        if taken is not None and not taken.open and "lr" not in taken.parameters:
            return [(where, f"local_training.optimizer is {optimizer}, which takes no lr") for where in given]
    return [
        (f"federation.learning_rates.{client}", f"there is no such client: the ids are 0 … {count - 1}")
        for client in own
        if client >= count
    ]


def _dishonest(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require that adversaries are existing clients, each in one entry, given by id or by fraction."""
    if broken & {"adversaries", "federation"}:
        return []
    count, owner, problems, drawn = tree["federation"]["clients"], {}, [], 0
    for i, entry in enumerate(tree["adversaries"]):
        if (entry["clients"] is None) == (entry["fraction"] is None):
            problems.append((f"adversaries.{i}", "give clients or fraction, one of the two"))
        for client in entry["clients"] or ():
            where = f"adversaries.{i}.clients"
            if not 0 <= client < count:
                problems.append((where, f"there is no client {client}: the ids are 0 … {count - 1}"))
            elif client in owner:
                problems.append((where, f"client {client} is in adversaries.{owner[client]} already"))
            owner.setdefault(client, i)
        drawn += int((entry["fraction"] or 0) * count + 0.5)
    if len(owner) + drawn > count:
        problems.append(("adversaries", f"{len(owner) + drawn} clients are to be dishonest, and there are {count}"))
    return problems


def _outvoted(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require as many uploads per round as a robust rule needs."""
    if broken & {"method", "federation"}:
        return []
    clients, problems = tree["federation"]["clients"], []
    asked = int(tree["federation"]["client_fraction"] * clients + 0.5)
    rule, where = tree["method"]["args"].get("robust"), "method.args.robust"
    while isinstance(rule, Mapping) and rule.get("target") in short_names(KINDS["robust_rule"]):
        definition, args = find(rule["target"], KINDS["robust_rule"]).definition, rule.get("args") or {}
        if per_attacker := definition.constant("uploads_per_attacker"):
            attackers = args.get("num_attackers", 1)
            least = per_attacker * attackers + definition.constant("extra_uploads")
            if asked < least:
                needs = f"{rule['target']} with num_attackers = {attackers} needs {least} uploads in a round"
                problems.append((where, f"{needs}, and {asked} clients are asked"))
        rule, where = args.get("rule"), f"{where}.args.rule"
    return problems


_UNCOMPILED = ("none", "traced")
"""Modes of a training without `torch.compile`."""


def _compiled(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Refuse compiled steps for clients that are trained in a vectorised pass, which has its own steps."""
    if "client_execution" in broken or tree["client_execution"] != "vectorized":
        return []
    message = (
        "must be none or traced with client_execution: vectorized, which trains clients in a vectorised pass of its own"
    )
    return [
        (f"{part}.compile", message)
        for part in ("local_training", "client_distil")
        if part not in broken and tree[part] and tree[part]["compile"] not in _UNCOMPILED
    ]


def _sharded(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Find settings that sharded models do not support."""
    if "fabric" in broken or tree["fabric"]["strategy"] != "fsdp":
        return []
    fabric, problems = tree["fabric"], []
    if fabric["accelerator"] in ("cpu", "mps", "tpu"):
        message = f"fsdp needs GPUs, and fabric.accelerator is {fabric['accelerator']}; take auto or ddp"
        problems.append(("fabric.strategy", message))
    if fabric["precision"] in ("16-mixed", "transformer-engine"):
        problems.append(("fabric.precision", "must be another one with fabric.strategy: fsdp; take bf16-mixed"))
    if "client_execution" not in broken and tree["client_execution"] == "vectorized":
        message = "must be sequential or auto with fabric.strategy: fsdp, where all ranks train one client together"
        problems.append(("client_execution", message))
    if "evaluation" not in broken and tree["evaluation"]["attacks"]:
        message = "must be empty with fabric.strategy: fsdp; attack the finished run with fdl audit"
        problems.append(("evaluation.attacks", message))
    private = tree["privacy"] if "privacy" not in broken else None
    if private is not None and private["training"] == "dp_sgd":
        message = "must be none with fabric.strategy: fsdp: gradients of single examples need whole models; take auto"
        problems.append(("privacy.training", message))
    known = [part for part in _FITS if part not in broken]
    steps = {f"{part}.compile": tree[part] and tree[part]["compile"] not in _UNCOMPILED for part in known}
    answers = {"inference.compile": "inference" not in broken and tree["inference"]["compile"]}
    message = "must be off with fabric.strategy: fsdp: weights are gathered between the parts of a pass"
    return problems + [(key, message) for key, compiled in sorted({**steps, **answers}.items()) if compiled]


def _links(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require valid links of existing clients."""
    if "channel" in broken:
        return []
    try:
        own = Bandwidth(tree["channel"]["bandwidth"], tree["channel"]["clients"]).clients
    except UserError as error:
        where, _, message = str(error).partition(": ")
        return [(f"channel.{where}", message)]
    if "federation" in broken:
        return []
    count = tree["federation"]["clients"]
    return [
        (f"channel.clients.{client}", f"there is no such client: the ids are 0 … {count - 1}")
        for client in own
        if client >= count
    ]


def _keys(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Refuse a file of keys if messages are not authenticated."""
    if "channel" in broken or tree["channel"]["authenticate"] is not False or tree["channel"]["keys"] is None:
        return []
    return [("channel.keys", "is not used: channel.authenticate is false")]


def _faults(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require that clients of faults exist."""
    if broken & {"faults", "federation"}:
        return []
    count = tree["federation"]["clients"]
    return [
        (f"faults.{i}.args.clients", f"there is no client {client}: the ids are 0 … {count - 1}")
        for i, fault in enumerate(tree["faults"])
        for client in fault["args"].get("clients") or ()
        if isinstance(client, int) and not 0 <= client < count
    ]


def _private(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require a budget or noise for private training, and that no private data are used without noise."""
    privacy = tree["privacy"] if not broken & {"privacy", "local_training", "fabric", "method"} else None
    if privacy is None or privacy["training"] == "none":
        return []
    problems = []
    if tree["local_training"]["compile"] not in _UNCOMPILED:
        problems.append(
            ("local_training.compile", "must be none or traced under privacy: gradients are clipped example by example")
        )
    if privacy["epsilon"] is None and privacy["noise_multiplier"] is None:
        problems.append(("privacy.epsilon", "missing: give a budget, for which noise is found, or a noise_multiplier"))
    if privacy["noise_multiplier"] is None and tree.get("arrival") is not None:
        message = "missing: noise is found for a number of samples that stays, and arrival changes it"
        problems.append(("privacy.noise_multiplier", message))
    if tree["local_training"]["gradient_clip"] is not None:
        problems.append(
            ("local_training.gradient_clip", "must be null under privacy: privacy.clip is for each example")
        )
    if tree["fabric"]["precision"] not in ("32-true", "64-true", "bf16-mixed"):
        message = "training with noise needs 32-true, 64-true or bf16-mixed"
        problems.append(("fabric.precision", f"{message}; got {tree['fabric']['precision']}"))
    if "pooled" in _requires(tree):
        message = f"method {tree['method']['target']} trains on all private data in one place, without noise"
        problems.append(("privacy", message))
    return problems


def _required_parts(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require the parts that the method declares."""
    if "method" in broken:
        return []
    return [
        (part, f"missing: method {tree['method']['target']} needs {part}")
        for part in _requires(tree)
        if part in tree and part not in broken and not tree[part]
    ]


def _proxy(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require a proxy set if the method needs one and the data module makes none by default."""
    if broken & {"method", "data"} or "proxy" not in _requires(tree):
        return []
    args, taken = tree["data"]["args"], find(tree["data"]["target"], KINDS["datamodule"]).signature
    parameter = taken.parameters.get("proxy") if taken is not None else None
    # any argument with this prefix: some data modules make a proxy set of groups or packages
    if parameter is None or any(value for name, value in args.items() if name.startswith("proxy")):
        return []
    if "proxy" not in args and not (isinstance(parameter.default, ast.Constant) and parameter.default.value is None):
        return []
    message = f"missing: method {tree['method']['target']} needs a proxy set: {PROXY}"
    return [("data.args.proxy", message)]


def _requires(tree: dict[str, Any]) -> tuple[str, ...]:
    """Find parts of the recipe that the method requires and that are missing."""
    method = find(tree["method"]["target"], KINDS["method"])
    if method.definition is not None:
        return method.definition.constant("requires") or ()
    return getattr(method.load(), "requires", ()) or ()


def _comparison(tree: dict[str, Any], broken: set[str]) -> Problems:
    compare = tree.get("compare") if "compare" not in broken else None
    if compare is None:
        return []
    problems = []
    if not compare["seeds"] or len(set(compare["seeds"])) < len(compare["seeds"]):
        problems.append(("compare.seeds", f"expected different seeds, at least one; got {compare['seeds']}"))
    known = {*compare["variants"], *short_names(KINDS["method"])}
    for part in ("reference", "bytes_reference", "single_site_reference"):
        if compare[part] not in known:
            hint = suggest(compare[part], known)
            problems.append((f"compare.{part}", f"{compare[part]!r} is neither a variant nor a method{hint}"))
    return problems


def _metrics(tree: dict[str, Any], broken: set[str]) -> Problems:
    """Require metrics that some task has; the task itself is known only when the data are read."""
    if "evaluation" in broken or tree["evaluation"]["metrics"] is None:
        return []
    known = dict.fromkeys(name for task in TASKS.values() for name in task.metrics)
    return [
        (f"evaluation.metrics.{i}", f"unknown metric {metric!r}{suggest(metric, known)}")
        for i, metric in enumerate(tree["evaluation"]["metrics"])
        if metric not in known
    ]


def _constructed(tree: Mapping[str, Any], broken: set[str]) -> Problems:
    """Construct the built-in parts that do not import torch, so that errors of their constructors come early too."""
    problems = []

    def attempt(component: Mapping[str, Any], kind: str, where: str) -> Any:
        if any(k == where or k.startswith(f"{where}.") for k in broken):
            return None
        if not find(component["target"], KINDS[kind]).path.startswith("fdl."):
            return None
        try:
            return instantiate(component, kind, where)
        except UserError as error:
            problems.append(tuple(str(error).split(": ", 1)))
        return None

    if isinstance(tree.get("partition"), Mapping):
        attempt(tree["partition"], "partitioner", "partition")
    faults = tree.get("faults")
    for i, fault in enumerate(faults if isinstance(faults, list) else ()):
        attempt(fault, "fault", f"faults.{i}")
    channel = tree.get("channel", {})
    for direction in ("upload", "download"):
        stages = channel.get(direction)
        if not isinstance(stages, list):
            continue
        made = [attempt(stage, "codec", f"channel.{direction}.{i}") for i, stage in enumerate(stages)]
        if all(stage is not None for stage in made):
            from fdl.comm.codec import Codec

            try:
                Codec(made)
            except UserError as error:
                problems.append((f"channel.{direction}", str(error)))
    return problems
