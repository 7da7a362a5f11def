"""The sections of a recipe."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from omegaconf import OmegaConf

from fdl.recipe.fields import _COUNT, Bounds, key
from fdl.registry.component import Component


@dataclass
class Scheduler(Component):
    """A learning-rate schedule and when it steps."""

    interval: Literal["step", "epoch", "round"] = key("epoch", "when the schedule steps")

    __hash__ = Component.__hash__


@dataclass
class Specialist(Component):
    """A private architecture, and which clients have it."""

    clients: list[int] | None = key(None, "ids of the clients that have it; null: those whom no entry names")
    weight: float = key(1.0, "how often it is drawn, where assignment is random", bounds=Bounds(0, open_low=True))
    lr: float | None = key(
        None,
        "learning rate of its clients' training on their own data; null: local_training's",
        bounds=Bounds(0, open_low=True),
    )

    __hash__ = Component.__hash__


@dataclass
class AdversaryConfig(Component):
    """A kind of dishonest client, and which clients are of it, by id or as a fraction."""

    clients: list[int] | None = key(None, "ids of the clients; null: as fraction says")
    fraction: float | None = key(None, "fraction of all clients, drawn at random", bounds=Bounds(0, 1))
    start: int = key(1, "the round from which they are dishonest", bounds=_COUNT)

    __hash__ = Component.__hash__


@dataclass(frozen=True)
class Fit:
    """One training: for how long, on what batches, with which optimiser; a value, equal to any that trains alike."""

    epochs: int | None = key(None, "passes over the data; 1 when steps are not given either", bounds=Bounds(0))
    steps: int | None = key(None, "optimiser steps, instead of epochs", bounds=Bounds(0))
    batch_size: int = key(32, "samples a step", bounds=_COUNT)
    optimizer: Component = key(Component("sgd", {"lr": 0.1}), "its optimiser, new for every fit", kind="optimizer")
    scheduler: Scheduler | None = key(None, "its learning-rate schedule", kind="scheduler")
    gradient_clip: float | None = key(None, "largest norm of a gradient", bounds=Bounds(0, open_low=True))
    compile: Literal["none", "traced", "default", "reduce-overhead"] = key(
        "traced",
        "how steps are computed: none calls training_step for every batch; traced, too, but replays steps of small "
        "models that are marked @traceable, as fdl's own are, once they have come often; default and reduce-overhead "
        "(CUDA graphs) run full batches through torch.compile",
    )

    def __post_init__(self) -> None:
        """Settle on one epoch where nothing is said."""
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)

    @cached_property
    def optimizer_key(self) -> str:
        """The optimiser and its arguments as text, equal for equal settings: a key that is cheap to look up."""
        return json.dumps(dataclasses.asdict(self.optimizer), sort_keys=True, default=repr)


@dataclass
class Federation:
    """Who takes part."""

    clients: int = key(5, "number of institutions", bounds=_COUNT)
    rounds: int = key(1, "communication rounds", bounds=_COUNT)
    client_fraction: float = key(
        1.0, "fraction of the clients that take part in a round", bounds=Bounds(0, 1, open_low=True)
    )
    dropout: float = key(0.0, "chance that a client asked does not answer", bounds=Bounds(0, 1, open_high=True))
    assignment: Literal["in_turn", "random"] = key(
        "in_turn", "how clients that no specialist names get one: entry i counted round, or drawn by weight"
    )
    deadline: float | None = key(
        None, "seconds of a round after which no upload is taken; null: none", bounds=Bounds(0, open_low=True)
    )
    client_state: Literal["memory", "disk"] = key("memory", "where clients' models and states lie between their turns")
    learning_rates: Any = key(
        {}, "by client id, learning rates of training on own data that differ from local_training's"
    )
    too_small: Literal["refuse", "leave_out"] = key(
        "refuse", "sites with fewer samples than their model can be trained on: refuse the run, or run without them"
    )
    calibration_fraction: float | None = key(
        None,
        "fraction of a client's data held out to calibrate; null: a tenth where the method looks at it, else none",
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
    ghost_clipping: bool = key(
        False, "clip without the gradients of single examples: less memory, more time for small models"
    )
    max_physical_batch: int | None = key(
        None, "examples whose gradients are held at once; null: a whole batch", bounds=_COUNT
    )
    noise_seed: Any = key(
        None,
        "{file: PATH} of a secret that noise is drawn from; null: $FDL_NOISE_SEED, else the seed, for simulations",
    )
    on_exhausted: Literal["stop_client", "stop_run"] = key(
        "stop_client", "what ends when a client's budget is spent: its training on private data, or the run"
    )


@dataclass
class Channel:
    """How messages are coded."""

    upload: list[Component] = key([], "codec stages from client to server, in order", kind="codec")
    download: list[Component] = key([], "codec stages from server to client, in order", kind="codec")
    max_message_bytes: int = key(1 << 31, "bytes beyond which a message is refused", bounds=_COUNT)
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
    evaluators: list[Component] = key([], "further measurements of the student", kind="evaluator")
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
    adversaries: list[AdversaryConfig] = key([], "clients that are dishonest", kind="adversary")
    local_training: Fit = key(Fit(), "how clients train on their own data")
    server_distil: Fit = key(Fit(), "how the server trains the student on public data")
    client_distil: Fit | None = key(None, "how clients learn from what comes back; null: as server_distil")
    privacy: Privacy | None = key(None, "differential privacy; null: none")
    channel: Channel = key(Channel(), "how messages are coded")
    evaluation: Evaluation = key(Evaluation(), "what is measured")
    inference: Inference = key(Inference(), "how models answer")
    checkpoint: Checkpoint = key(Checkpoint(), "how often the run is saved")
    fabric: Fabric = key(Fabric(), "devices and precision")
    client_execution: Literal["auto", "sequential", "vectorized"] = key(
        "sequential", "how clients take their turns: one by one, together, or together where the models are small"
    )
    callbacks: list[Component] = key(
        [Component("tensorboard"), Component("csv"), Component("progress")], "what watches the run", kind="callback"
    )
    profile: bool = key(False, "record a round with torch's profiler, for TensorBoard, and write profile.txt")
    output_dir: str = key("runs", "folder in which the run's own folder lies")
    compare: Compare | None = key(None, "what fdl compare runs")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain dicts and lists."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The recipe as YAML, which `load` reads back as an equal recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))
