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

    clients: list[int] | None = key(None, "ids of the clients that have it; null: the clients in no entry")
    weight: float = key(1.0, "relative frequency of it in a random assignment", bounds=Bounds(0, open_low=True))
    lr: float | None = key(
        None,
        "learning rate of its clients' training on their own data; null: local_training's",
        bounds=Bounds(0, open_low=True),
    )

    __hash__ = Component.__hash__


@dataclass
class AdversaryConfig(Component):
    """A kind of adversary and its clients, given by id or as a fraction."""

    clients: list[int] | None = key(None, "ids of the clients; null: drawn by fraction")
    fraction: float | None = key(None, "fraction of all clients, drawn at random", bounds=Bounds(0, 1))
    start: int = key(1, "first round of the attack", bounds=_COUNT)

    __hash__ = Component.__hash__


@dataclass(frozen=True)
class Fit:
    """Settings of a training: its length, batches and optimiser. Equal settings are equal and have one hash."""

    epochs: int | None = key(None, "passes over the data; 1 when steps are not given either", bounds=Bounds(0))
    steps: int | None = key(None, "optimiser steps, instead of epochs", bounds=Bounds(0))
    batch_size: int = key(32, "samples per step", bounds=_COUNT)
    optimizer: Component = key(
        Component("sgd", {"lr": 0.1}), "the optimiser, created for each training", kind="optimizer"
    )
    scheduler: Scheduler | None = key(None, "the learning-rate schedule", kind="scheduler")
    gradient_clip: float | None = key(None, "largest norm of a gradient", bounds=Bounds(0, open_low=True))
    compile: Literal["none", "traced", "default", "reduce-overhead"] = key(
        "traced",
        "how steps are computed: none calls training_step for every batch; traced also does, until a step of a small "
        "model that is marked @traceable (as fdl's own are) is replayed from its recorded operations; default and "
        "reduce-overhead (CUDA graphs) run full batches through torch.compile",
    )

    def __post_init__(self) -> None:
        """Default to one epoch if neither epochs nor steps are given."""
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)

    @cached_property
    def optimizer_key(self) -> str:
        """The optimiser and its arguments as text, equal for equal settings: a key that is cheap to look up."""
        return json.dumps(dataclasses.asdict(self.optimizer), sort_keys=True, default=repr)


@dataclass
class FederationConfig:
    """The clients: how many, which take part in a round, and where their states are kept."""

    clients: int = key(5, "number of institutions", bounds=_COUNT)
    rounds: int = key(1, "communication rounds", bounds=_COUNT)
    client_fraction: float = key(
        1.0, "fraction of the clients that take part in a round", bounds=Bounds(0, 1, open_low=True)
    )
    dropout: float = key(0.0, "probability that a selected client drops out", bounds=Bounds(0, 1, open_high=True))
    assignment: Literal["in_turn", "random"] = key(
        "in_turn", "how the remaining clients get an architecture: round-robin, or sampled by weight"
    )
    deadline: float | None = key(
        None, "seconds after which a round accepts no more uploads; null: no limit", bounds=Bounds(0, open_low=True)
    )
    client_state: Literal["memory", "disk"] = key(
        "memory", "where clients' models and states are kept between local updates"
    )
    learning_rates: Any = key(
        {}, "learning rates of local training by client id, where they differ from local_training's"
    )
    too_small: Literal["refuse", "leave_out"] = key(
        "refuse", "clients with too few samples to train their model: refuse the run, or run without them"
    )
    calibration_fraction: float | None = key(
        None,
        "fraction of a client's data held out for calibration; null: 0.1 if the method uses it, else 0",
        bounds=Bounds(0, 1, open_high=True),
    )


@dataclass
class Privacy:
    """Differential privacy: budgets, and training with noise."""

    training: Literal["dp_sgd", "none"] = key(
        "dp_sgd",
        "whether clients train with noise, which hides single examples, or only releases of the method are noisy",
    )
    epsilon: float | None = key(None, "largest ε per client; null: no limit", bounds=Bounds(0, open_low=True))
    delta: float = key(1e-5, "δ of each ε", bounds=Bounds(0, 1, open_low=True, open_high=True))
    accountant: Literal["pld", "rdp"] = key(
        "pld", "accounting over rounds: privacy loss distributions, or Rényi divergence"
    )
    noise_multiplier: float | None = key(
        None, "noise relative to clip; null: as much as the client's epsilon requires over all rounds", bounds=Bounds(0)
    )
    clip: float = key(1.0, "clipping norm of per-example gradients", bounds=Bounds(0, open_low=True))
    ghost_clipping: bool = key(
        False, "clip without storing per-example gradients: less memory, slower for small models"
    )
    max_physical_batch: int | None = key(
        None, "examples whose gradients are in memory at a time; null: the whole batch", bounds=_COUNT
    )
    noise_seed: Any = key(
        None,
        "{file: PATH} of the secret seed of the noise; null: $FDL_NOISE_SEED, else the seed, for simulations",
    )
    on_exhausted: Literal["stop_client", "stop_run"] = key(
        "stop_client", "what to stop when a client's budget is exhausted: its training on private data, or the run"
    )


@dataclass
class ChannelConfig:
    """Codecs, limits and authentication of messages."""

    upload: list[Component] = key([], "codec stages from client to server, in order", kind="codec")
    download: list[Component] = key([], "codec stages from server to client, in order", kind="codec")
    max_message_bytes: int = key(1 << 31, "largest message in bytes; larger ones are rejected", bounds=_COUNT)
    bandwidth: Any = key("unlimited", "the clients' links: unlimited, moderate, severe, or figures")
    clients: Any = key({}, "links by client id, where they differ from bandwidth")
    authenticate: bool | None = key(
        None, "add an authentication tag made with the client's key to each message; null: if there is a file of keys"
    )
    keys: str | None = key(None, "file of the clients' keys; null: derived from the seed, for simulations only")


@dataclass
class Evaluation:
    """Metrics, evaluators and attacks, and when they run."""

    every: int = key(1, "rounds between evaluations; the last round is always evaluated", bounds=_COUNT)
    batch_size: int = key(512, "samples per forward pass", bounds=_COUNT)
    metrics: list[str] | None = key(None, "names of metrics; null: the defaults for the kind of data")
    evaluators: list[Component] = key([], "further measurements of the student", kind="evaluator")
    attacks: list[Component] = key([], "attacks on private data, run once after the last round", kind="attack")
    specialists: bool = key(True, "evaluate the clients' own models, too")


@dataclass
class Inference:
    """Inference of models that are not being trained."""

    compile: bool = key(False, "run forward passes through torch.compile, which pays off on large proxy sets")
    cache: str | None = key(None, "folder that caches frozen models' predictions across runs")


@dataclass
class Checkpoint:
    """Frequency and number of checkpoints."""

    every: int = key(1, "rounds between checkpoints; the last round is always saved", bounds=_COUNT)
    keep: int = key(2, "checkpoints kept", bounds=_COUNT)


@dataclass
class Fabric:
    """Devices and precision, passed to Lightning's Fabric."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = key("auto", "kind of device")
    devices: int | str = key(1, "number of devices; clients are distributed over them")
    num_nodes: int = key(1, "number of machines", bounds=_COUNT)
    strategy: Literal["auto", "ddp", "fsdp"] = key(
        "auto",
        "how processes train the server's models: auto: each the same by itself; ddp: every batch is split among them; "
        "fsdp, on GPUs: each holds a shard of every model, the clients' included",
    )
    timeout: float = key(1800.0, "seconds that processes wait for each other", bounds=Bounds(0, open_low=True))
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine"] = (
        key("32-true", "number format of training")
    )
    threads: int = key(1, "torch's CPU threads in each process; another number rounds otherwise", bounds=_COUNT)


@dataclass
class Compare:
    """Seeds, variants and references of ``fdl compare``."""

    seeds: list[int] = key([0, 1, 2], "one run per variant and seed")
    reference: str = key("centralized", "variant or method whose score counts as 1")
    bytes_reference: str = key("fedavg", "variant or method whose bytes count as 1")
    single_site_reference: str = key(
        "single_site", "variant or method whose clients train alone: the baseline of gains and of the recovered gap"
    )
    variants: dict[str, dict[str, Any]] = key({}, "the keys in which each variant differs, by name")


@dataclass
class Recipe:
    """An experiment, resolved: interpolations, overrides and defaults are all in place."""

    name: str = key("", "name of the run and its folder; the file's name by default")
    seed: int = key(0, "root of all random streams", bounds=Bounds(0))
    method: Component = key(Component(), "the federated algorithm", kind="method")
    data: Component = key(Component(), "the data set", kind="datamodule")
    partition: Component = key(Component("iid"), "how samples are divided among clients", kind="partitioner")
    arrival: Component | None = key(None, "when samples arrive; null: all at the start", kind="arrival")
    federation: FederationConfig = key(FederationConfig(), "the clients that take part")
    specialists: list[Specialist] = key([], "the clients' own models, see federation.assignment", kind="module")
    student: Component | None = key(None, "the global model", kind="module")
    teacher: Component | None = key(None, "the large model of standard distillation", kind="module")
    encoder: Component | None = key(None, "frozen public encoder that all sites share", kind="encoder")
    faults: list[Component] = key([], "simulated faults of clients", kind="fault")
    adversaries: list[AdversaryConfig] = key([], "Byzantine clients", kind="adversary")
    local_training: Fit = key(Fit(), "how clients train on their own data")
    server_distil: Fit = key(Fit(), "how the server trains the student on public data")
    client_distil: Fit | None = key(None, "how clients learn from the download; null: as server_distil")
    privacy: Privacy | None = key(None, "differential privacy; null: none")
    channel: ChannelConfig = key(ChannelConfig(), "codecs and limits of messages")
    evaluation: Evaluation = key(Evaluation(), "metrics, evaluators and attacks")
    inference: Inference = key(Inference(), "inference of models that are not being trained")
    checkpoint: Checkpoint = key(Checkpoint(), "frequency and number of checkpoints")
    fabric: Fabric = key(Fabric(), "devices and precision")
    client_execution: Literal["auto", "sequential", "vectorized"] = key(
        "sequential", "how clients are run: one by one, in vectorised passes, or auto: vectorised for small models"
    )
    callbacks: list[Component] = key(
        [Component("tensorboard"), Component("csv"), Component("progress")], "callbacks of the run", kind="callback"
    )
    profile: bool = key(False, "record a round with torch's profiler, for TensorBoard, and write profile.txt")
    output_dir: str = key("runs", "folder that contains the run folders")
    compare: Compare | None = key(None, "seeds, variants and references of fdl compare")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain dicts and lists."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which `load` reads back as an equal recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))
