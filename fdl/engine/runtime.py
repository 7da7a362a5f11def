"""How participants compute: precision, shared modules and the one training loop, on Lightning's Fabric.

Clients are moved to the device, never `fabric.setup`: under a distributed strategy that would average the gradients
of different institutions. There is one module per architecture, which a client borrows
for its turn and fills with its weights, so that memory on the device does not grow with the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdl.engine.distributed import launch_environment as clusters
from fdl.engine.distributed.devices import fabric_of
from fdl.engine.distributed.process_group import ProcessGroup, missing_processes_error
from fdl.engine.inference import OutputSelector, predict
from fdl.engine.prediction_cache import PredictionCache
from fdl.engine.steps.selection import StepSelection
from fdl.engine.training_loop import batch_to_device, train
from fdl.modules.objectives import Objective, training_step
from fdl.state.model_handle import ModelHandle, handle_of
from fdl.state.weights import module_state, trainable
from fdl.utils.seeding import stream_seed
from fdl.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.modules.types import Batch
    from fdl.recipe.config import Fit


class Runtime:
    """Where and how participants compute.

    Args:
        accelerator: as Lightning's, e.g. ``"auto"``, ``"cpu"``, ``"gpu"``.
        devices: number of devices.
        num_nodes: number of machines.
        strategy: ``"auto"``: clients are spread over ranks, and the server's models are trained alike by all ranks, to
            the bit; ``"ddp"``: ranks share the samples of the server's batches and sum their gradients, as Lightning's
            DDP does; ``"fsdp"``: every rank holds a part of every model, with its gradients and its optimiser's state,
            and all ranks train all models together, one client after another.
        precision: as Lightning's, e.g. ``"32-true"`` or ``"bf16-mixed"``.
        batch_size: samples a forward pass of `predict`.
        compile: run `predict` through ``torch.compile``.
        cache: folder where the answers of frozen models are kept across runs; None keeps them in memory.
        timeout: seconds that a process waits for the others of the run.
        launch: join the other processes; without it there is this one alone, on one device.

    Attributes:
        ranks: the processes of the run.
        clock: where the run's time goes.
        steps: chooses the strategy of a fit's steps, and keeps optimisers and compiled steps.
        sharder: spreads models over ranks; None: every rank has whole ones.
    """

    def __init__(
        self,
        accelerator: str = "auto",
        devices: int = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str = "32-true",
        batch_size: int = 512,
        compile: bool = False,
        cache: str | None = None,
        timeout: float = 1800.0,
        launch: bool = True,
    ):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and it takes time
        many = (devices, num_nodes, strategy) if launch else (1, 1, "auto")
        self.fabric = fabric_of(accelerator, *many, precision, timeout)
        if launch:
            clusters.check_world_size(getattr(self.fabric.strategy, "num_processes", 1), num_nodes)
        try:
            self.fabric.launch()
        except dist.DistError as error:
            raise missing_processes_error(error, timeout) from error
        self.sharder = None
        self.ranks = ProcessGroup(self.fabric, timeout, sharded=launch and strategy == "fsdp")
        if self.ranks.sharded:
            from fdl.engine.distributed.sharding import Sharder

            self.sharder = Sharder(self.fabric, self.ranks)
        self.batch_size, self.compile, self.prediction_cache = batch_size, compile, PredictionCache(cache)
        self.steps = StepSelection(self.fabric, self.ranks, self.sharder, strategy)
        self.is_dry_run, self.clock = False, Stopwatch()
        self.factories: dict[str, Callable[[], LightningModule]] = {}
        self._shared: dict[str, LightningModule] = {}

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.fabric.device

    # -- modules -------------------------------------------------------------------------------------------------

    def create(self, architecture: str, seed: int) -> LightningModule:
        """Build a module with weights drawn from `seed`, on the device, leaving torch's random state as it was."""
        module = self._build(architecture, seed)
        if self.sharder is not None:
            return self.sharder.place(module)
        module = self.fabric.to_device(module)
        ModelHandle(module)
        return module

    def first_weights(self, architecture: str, seed: int) -> dict[str, Tensor]:
        """The weights of a module as `create` builds it, in host memory."""
        return module_state(self._build(architecture, seed))

    def _build(self, architecture: str, seed: int) -> LightningModule:
        """A new module in host memory, in the recipe's precision."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = self.factories[architecture]()
        return self.fabric.strategy.precision.convert_module(module)

    def place(self, module: LightningModule) -> LightningModule:
        """Move a module to the device in the recipe's precision."""
        return self.fabric.to_device(self.fabric.strategy.precision.convert_module(module))

    def shared_module(self, architecture: str) -> LightningModule:
        """The one module of an architecture that clients take turns to borrow, to look at its structure.

        Its weights are whoever's borrowed it last; they can be changed by `borrow` only.

        Args:
            architecture: a key of `factories`.
        """
        if architecture not in self._shared:
            module = self._shared[architecture] = self.create(architecture, seed=0)
            handle_of(module).writable = False
        return self._shared[architecture]

    @contextmanager
    def borrow(self, architecture: str, weights: Mapping[str, Tensor] | None = None) -> Iterator[LightningModule]:
        """Within this context an architecture's shared module belongs to the caller, who may fill and train it.

        Args:
            architecture: a key of `factories`.
            weights: what to fill it with, names as in `module_state`; None leaves the weights of whoever had it last.

        Raises:
            RuntimeError: it is borrowed already: two borrowers would overwrite each other's weights.
            ValueError: the weights do not fit.
        """
        module = self.shared_module(architecture)
        handle = handle_of(module)
        if handle.writable:
            raise RuntimeError(
                f"the module of architecture {architecture!r} is borrowed already, and there is one; leave the block "
                "that borrowed it first, or fill that module once more"
            )
        handle.writable = True
        try:
            if weights is not None:
                handle.load(weights)
            yield module
        finally:
            handle.writable = False

    # -- training ------------------------------------------------------------------------------------------------

    def fit(
        self,
        module: nn.Module,
        samples: Samples,
        config: Fit,
        generator: torch.Generator,
        objective: Objective | None = None,
        round: int = 1,
        watch: Callable[[int], bool] | None = None,
    ) -> dict[str, float]:
        """Train a module on samples.

        Args:
            module: the module to train, in place.
            samples: what to train on.
            config: epochs or steps, batch size, optimiser, schedule, clipping, and whether steps are compiled.
            generator: the stream that orders (and augments) the samples.
            objective: what to minimise; default the module's own `training_step`.
            round: the round, for schedules that count rounds.
            watch: called after every step with the number of steps so far; True ends the fit. It may predict with the
                module.

        Returns:
            The mean over steps of every named loss; empty when there was nothing to do.
        """
        if self.is_dry_run or len(samples) == 0 or config.epochs == 0 or config.steps == 0:
            return {}
        parameters = trainable(module)
        if not parameters:  # a frozen teacher has nothing to learn
            return {}
        step = self.steps.choose(module, parameters, objective or training_step, config)
        return train(step, samples, config, generator, round, watch)

    def all_ranks(self) -> AbstractContextManager[None]:
        """Within this context all ranks train the same models; under DDP they share the samples of every batch."""
        return self.steps.all_ranks()

    # -- inference -----------------------------------------------------------------------------------------------

    def predict(self, module: nn.Module, samples: Samples, what: OutputSelector = "logits") -> Tensor:
        """One pass over samples without gradients.

        Args:
            module: a module whose forward gives an `Output`.
            samples: what to answer.
            what: the field of `Output` to collect, e.g. ``"logits"`` or ``"embedding"``, or a function of module and
                inputs whose result has the same shape for every batch but for the first dimension.

        Returns:
            float32 tensor on the CPU, [n, …].
        """
        # what is frozen answers once: across rounds from memory, across runs from the recipe's folder
        frozen = not trainable(module) and next(module.parameters(), None) is not None
        cache = self.prediction_cache if frozen else None
        with self.clock.part("extraction", within="clients"):
            if self.sharder is not None:
                return self.sharder.predict(module, samples, what, self.batch_size, cache)
            return predict(self.fabric, module, samples, what, self.batch_size, compile=self.compile, cache=cache)

    def to_device(self, batch: Batch) -> Batch:
        """A batch on the device; a GPU gets it without anybody waiting for the copy."""
        return batch_to_device(batch, self.device)

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Within this context `fit` does nothing, so that messages can be made, and measured, without training."""
        self.is_dry_run = True
        try:
            yield
        finally:
            self.is_dry_run = False


def seed_everything(seed: int, purpose: str, round: int = 0, client: int = -1) -> None:
    """Seed torch's global streams (dropout, random initial weights) for one participant's turn."""
    number = stream_seed(seed, purpose, round, client)
    # torch.manual_seed formats a stack trace for every kind of device that is not there, which costs more than a step
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
