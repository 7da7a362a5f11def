"""The recipe: one YAML file that says all about an experiment.

`load` reads it, applies overrides, and reports everything that is wrong at once, before torch is imported.
"""

# ruff: noqa: RUF009  `key` is a `dataclasses.field` with help text

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fdl import rules
from fdl.catalog import suggest
from fdl.components import Checker, instantiate
from fdl.errors import RecipeError, UserError
from fdl.overrides import Override, apply
from fdl.schema import Bounds, Component, check, fill, key
from fdl.source import SourceModule

__all__ = ["Component", "Fit", "Recipe", "Scheduler", "difference", "from_mapping", "instantiate", "load"]

_COUNT = Bounds(1)


@dataclass
class Scheduler(Component):
    """A learning-rate schedule and when it steps."""

    interval: Literal["step", "epoch", "round"] = key("epoch", "when the schedule steps")


@dataclass
class Specialist(Component):
    """A private architecture, and which clients have it."""

    clients: list[int] | None = key(None, "ids of the clients that have it; null: those whom no entry names")
    weight: float = key(1.0, "how often it is drawn, where assignment is random", bounds=Bounds(0, open_low=True))
    lr: float | None = key(
        None, "learning rate of its clients' training on their own data; null: local's", bounds=Bounds(0, open_low=True)
    )


@dataclass
class Dishonest(Component):
    """A kind of dishonest client, and which clients are of it, by id or by share."""

    clients: list[int] | None = key(None, "ids of the clients; null: as share says")
    share: float | None = key(None, "share of all clients, drawn at random", bounds=Bounds(0, 1))
    start: int = key(1, "the round from which they are dishonest", bounds=_COUNT)


@dataclass
class Fit:
    """One training: for how long, on what batches, with which optimiser."""

    epochs: int | None = key(None, "passes over the data; 1 when steps are not given either", bounds=Bounds(0))
    steps: int | None = key(None, "optimiser steps, instead of epochs", bounds=Bounds(0))
    batch_size: int = key(32, "samples a step", bounds=_COUNT)
    optimizer: Component = key(Component("sgd", {"lr": 0.1}), "its optimiser, new for every fit", kind="optimizer")
    scheduler: Scheduler | None = key(None, "its learning-rate schedule", kind="scheduler")
    gradient_clip: float | None = key(None, "largest norm of a gradient", bounds=Bounds(0, open_low=True))
    compile: Literal["none", "default", "reduce-overhead"] = key(
        "none", "run steps on whole batches through torch.compile: not, in its default mode, or as CUDA graphs"
    )

    def __post_init__(self) -> None:
        """Settle on one epoch where nothing is said."""
        if self.epochs is None and self.steps is None:
            self.epochs = 1


@dataclass
class Federation:
    """Who takes part."""

    clients: int = key(5, "number of institutions", bounds=_COUNT)
    rounds: int = key(1, "communication rounds", bounds=_COUNT)
    participation: float = key(1.0, "share of the clients asked in a round", bounds=Bounds(0, 1, open_low=True))
    dropout: float = key(0.0, "chance that a client asked does not answer", bounds=Bounds(0, 1, open_high=True))
    assignment: Literal["in_turn", "random"] = key(
        "in_turn", "how clients that no specialist names get one: entry i counted round, or drawn by weight"
    )
    deadline: float | None = key(
        None, "seconds of a round after which no upload is taken; null: none", bounds=Bounds(0, open_low=True)
    )
    state: Literal["memory", "disk"] = key("memory", "where clients' models and states lie between their turns")
    learning_rates: Any = key({}, "by client id, learning rates of training on own data that differ from local's")
    too_small: Literal["refuse", "leave_out"] = key(
        "refuse", "sites with fewer samples than their model can be trained on: refuse the run, or run without them"
    )
    calibration: float | None = key(
        None,
        "share of a client's data held out to calibrate; null: a tenth where the method looks at it, else none",
        bounds=Bounds(0, 1, open_high=True),
    )


@dataclass
class Privacy:
    """Differential privacy: what may be spent of it, and how clients train with noise."""

    training: Literal["dp_sgd", "none"] = key(
        "dp_sgd", "clients train with noise, which hides an example; or not, and only what a method releases has noise"
    )
    epsilon: float | None = key(None, "most ε of a client; null: no limit", bounds=Bounds(0, open_low=True))
    delta: float = key(1e-5, "δ of every ε", bounds=Bounds(0, 1, open_low=True, open_high=True))
    accountant: Literal["pld", "rdp"] = key("pld", "how rounds add up: by loss distributions or by Rényi's divergence")
    noise_multiplier: float | None = key(
        None, "noise over clip; null: as much as a client's epsilon needs for all its rounds", bounds=Bounds(0)
    )
    clip: float = key(1.0, "largest norm of an example's gradient", bounds=Bounds(0, open_low=True))
    ghost: bool = key(False, "clip without the gradients of single examples: less memory, more time for small models")
    chunk: int | None = key(None, "examples whose gradients are held at once; null: a whole batch", bounds=_COUNT)
    noise_seed: Any = key(
        None,
        "{file: PATH} of a secret that noise is drawn from; null: $FDL_NOISE_SEED, else the seed, for simulations",
    )
    exhausted: Literal["client", "run"] = key(
        "client", "what ends when a client's budget is spent: its training on private data, or the run"
    )


@dataclass
class Channel:
    """How messages are coded."""

    upload: list[Component] = key([], "codec stages from client to server, in order", kind="codec")
    download: list[Component] = key([], "codec stages from server to client, in order", kind="codec")
    limit: int = key(1 << 31, "bytes beyond which a message is refused", bounds=_COUNT)
    bandwidth: Any = key("unlimited", "the clients' links: unlimited, moderate, severe, or figures")
    clients: Any = key({}, "by client id, links that differ from bandwidth")
    authenticate: bool | None = key(
        None, "whether messages carry a tag that only their client's key can make; null: if there is a file of keys"
    )
    keys: str | None = key(None, "file of the clients' keys; null: derived from the seed, for simulations only")


@dataclass
class Evaluation:
    """What is measured, and when."""

    every: int = key(1, "rounds between evaluations; the last round always is", bounds=_COUNT)
    batch_size: int = key(512, "samples a forward pass", bounds=_COUNT)
    metrics: list[str] | None = key(None, "names of metrics; null for those that suit the data")
    probes: list[Component] = key([], "further questions to the student", kind="evaluator")
    attacks: list[Component] = key([], "attacks on private data, tried once after the last round", kind="attack")
    specialists: bool = key(True, "whether the clients' own models are evaluated too")


@dataclass
class Inference:
    """How models answer when they are not trained."""

    compile: bool = key(False, "run forward passes through torch.compile, which pays off on large proxy sets")
    cache: str | None = key(None, "folder where frozen models' answers are kept across runs")


@dataclass
class Checkpoint:
    """How often the run is saved."""

    every: int = key(1, "rounds between checkpoints; the last round always is saved", bounds=_COUNT)
    keep: int = key(2, "checkpoints kept", bounds=_COUNT)


@dataclass
class Fabric:
    """Devices and precision, as Lightning's Fabric takes them."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = key("auto", "kind of device")
    devices: int | str = key(1, "number of devices; clients are spread over them")
    num_nodes: int = key(1, "number of machines", bounds=_COUNT)
    strategy: Literal["auto", "ddp", "fsdp"] = key(
        "auto",
        "how processes train the server's models: each by itself, alike; or ddp, sharing every batch; or fsdp, on "
        "GPUs: each holds a part of every model, of the clients' too",
    )
    timeout: float = key(1800.0, "seconds that processes wait for each other", bounds=Bounds(0, open_low=True))
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine"] = (
        key("32-true", "number format of training")
    )
    threads: int = key(1, "torch's CPU threads in each process; another number rounds otherwise", bounds=_COUNT)


@dataclass
class Compare:
    """What ``fdl compare`` runs."""

    seeds: list[int] = key([0, 1, 2], "one run of every variant for each seed")
    reference: str = key("centralized", "variant or method whose score counts as 1")
    bytes_reference: str = key("fedavg", "variant or method whose bytes count as 1")
    single_site_reference: str = key(
        "single_site", "variant or method whose clients train alone: where gains and the recovered gap count from"
    )
    variants: dict[str, dict[str, Any]] = key({}, "by name, the keys in which a variant differs")


@dataclass
class Recipe:
    """An experiment, resolved: interpolations, overrides and defaults are all in place."""

    name: str = key("", "name of the run and its folder; the file's name by default")
    seed: int = key(0, "of every random stream", bounds=Bounds(0))
    method: Component = key(Component(), "the federated algorithm", kind="method")
    data: Component = key(Component(), "where samples come from", kind="datamodule")
    partition: Component = key(Component("iid"), "who holds which samples", kind="partitioner")
    arrival: Component | None = key(None, "when samples come in; null: all are there from the first", kind="arrival")
    federation: Federation = key(Federation(), "who takes part")
    specialists: list[Specialist] = key([], "the clients' own models, see federation.assignment", kind="module")
    student: Component | None = key(None, "the global model", kind="module")
    teacher: Component | None = key(None, "the large model of standard distillation", kind="module")
    encoder: Component | None = key(None, "frozen public encoder that all sites share", kind="encoder")
    faults: list[Component] = key([], "what goes wrong at clients, on purpose", kind="fault")
    adversaries: list[Dishonest] = key([], "clients that are dishonest", kind="adversary")
    local: Fit = key(Fit(), "how clients train on their own data")
    distil: Fit = key(Fit(), "how the server trains the student on public data")
    digest: Fit | None = key(None, "how clients learn from what comes back; null: as distil")
    privacy: Privacy | None = key(None, "differential privacy; null: none")
    channel: Channel = key(Channel(), "how messages are coded")
    evaluation: Evaluation = key(Evaluation(), "what is measured")
    inference: Inference = key(Inference(), "how models answer")
    checkpoint: Checkpoint = key(Checkpoint(), "how often the run is saved")
    fabric: Fabric = key(Fabric(), "devices and precision")
    executor: Literal["auto", "sequential", "batched"] = key(
        "sequential", "how clients take their turns: one by one, together, or together where the models are small"
    )
    callbacks: list[Component] = key(
        [Component("tensorboard"), Component("csv"), Component("progress")], "what watches the run", kind="callback"
    )
    profile: bool = key(False, "record a round with torch's profiler, for TensorBoard, and write profile.txt")
    output: str = key("runs", "folder in which the run's own folder lies")
    compare: Compare | None = key(None, "what fdl compare runs")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain dicts and lists."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The recipe as YAML, which `load` reads back as an equal recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def load(path: str | Path, overrides: Sequence[str] = (), variant: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a YAML file.
        overrides: ``key=value`` strings; the later wins.
        variant: changes that come before the overrides, by dotted key; the recipe's other variants are not checked.

    Raises:
        UserError: when there is no such file.
        RecipeError: with all that is wrong in it.
    """
    path = Path(path)
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
        tree: as a YAML file would give it.
        overrides: ``key=value`` strings; the later wins.
        variant: changes that come before the overrides, by dotted key.
        source: what to call the recipe in messages.
        name: the run's name where the recipe gives none.
        lines: line numbers by key, for messages.

    Raises:
        RecipeError: with all that is wrong in it.
    """
    problems: list[str] = []
    parsed = []
    for text in overrides:
        try:
            parsed.append(Override.parse(text))
        except UserError as error:
            problems.append(str(error))
    changes = _changes(variant)
    raw, found = _applied(tree, [*changes, *parsed])
    recipe, more = _checked(raw, name)
    found += [one for one in more if one not in found]
    # one variant of a recipe that was read whole before: the others were checked then
    for variant_name, mapping in _variants(raw) if variant is None else ():
        inside, broken = _applied(tree, [*_changes(mapping), *parsed])
        broken += _checked(inside, name)[1]
        if broken and parsed:  # `fdl compare` says which override does not suit a variant; a single fit is none
            alone, wrong = _applied(tree, _changes(mapping))
            wrong += _checked(alone, name)[1]
            broken = [problem for problem in broken if problem in wrong]
        where = f"compare.variants.{variant_name}"
        found += [(where, f"{k}: {message}") for k, message in dict.fromkeys(broken) if (k, message) not in found]
    if found or problems:
        raise RecipeError(source, problems + [_located(k, message, parsed, lines or {}) for k, message in found])
    return recipe


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which two recipes, given as plain dicts, differ."""
    flat_a, flat_b = _flat(a), _flat(b)
    return [k for k in dict.fromkeys([*flat_a, *flat_b]) if flat_a.get(k, _ABSENT) != flat_b.get(k, _ABSENT)]


_ABSENT = object()
_LONGEST = 200
"""Letters of an override that a message repeats."""
_MODULE = SourceModule(__name__, Path(__file__))
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The parser that omegaconf reads with: the one in Python refuses tabs that this one, and YAML, allow."""


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
    """The filled tree with overrides, and which of them could not be applied."""
    filled = fill(_plain(tree), Recipe)
    problems = apply(filled, overrides)
    return filled, problems


def _variants(raw: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    compare = raw.get("compare")
    variants = compare.get("variants") if isinstance(compare, Mapping) else None
    pairs = variants.items() if isinstance(variants, Mapping) else ()
    return [(str(name), mapping) for name, mapping in pairs if isinstance(mapping, Mapping)]


def _checked(raw: Mapping[str, Any], name: str) -> tuple[Recipe | None, list[tuple[str, str]]]:
    """Resolve interpolations, check everything, and build the dataclass when all is well."""
    resolved, problems = _interpolated(raw)
    for part in ("student", "teacher"):  # "${specialists.0}" means its model, not who has it
        if isinstance(raw.get(part), str) and isinstance(resolved.get(part), Mapping):
            resolved[part] = {k: v for k, v in resolved[part].items() if k in ("target", "args")}
    checker = Checker()
    tree = check(fill(resolved, Recipe), Recipe, _MODULE, checker)
    broken = {k for k, _ in problems}
    problems += [(k, m) for k, m in checker.problems if not any(k == b or k.startswith(f"{b}.") for b in broken)]
    if "name" in tree:
        tree["name"] = tree["name"] or name
    problems += rules.violations(tree, {k for k, _ in problems})
    return (None if problems else _structured(tree)), problems


def _interpolated(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    config = OmegaConf.create(dict(raw))
    problems = []
    while True:
        try:
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=False), problems
        except OmegaConfBaseException as error:
            problems.append((_plain_key(error.full_key), _first_line(error)))
            OmegaConf.update(config, error.full_key, None)


def _structured(tree: Mapping[str, Any]) -> Recipe:
    """The dataclass, through omegaconf's structured config."""
    config = OmegaConf.structured(Recipe)
    for part in ("local", "distil"):
        config[part].optimizer.args = {}  # mappings merge: the default's arguments would stay
    return OmegaConf.to_object(OmegaConf.merge(config, tree))


def _plain(value: Any) -> Any:
    """A deep copy that overrides may change."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _lines(text: str) -> dict[str, int]:
    """The line of every key in a YAML text."""
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
    """A problem with the override or line that it comes from."""
    for override in reversed(overrides):
        # what is wrong with a component as a whole is wrong with its target
        if where == override.key or override.key == f"{where}.target" or where.startswith(f"{override.key}."):
            return f"{where}: {message} (from the override {override.text[:_LONGEST]!r})"
    parent = where
    while parent and parent not in lines:
        parent = parent.rpartition(".")[0]
    return f"{where}: {message}" + (f" (line {lines[parent]})" if parent else "")


def _near_file(path: Path) -> str:
    """Recipes that could have been meant."""
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
