"""Training and inference on Lightning's Fabric: devices, precision, and one shared module per architecture.

Client models are moved to the device without `fabric.setup`, which would average the gradients of different
institutions under a distributed strategy. A client borrows its architecture's module for its turn and loads its
weights into it, so that memory on the device does not grow with the number of clients.
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
    """The devices of a run, and training and inference on them.

    Args:
        accelerator: Lightning's accelerator, e.g. ``"auto"``, ``"cpu"``, ``"gpu"``.
        devices: number of devices.
        num_nodes: number of machines.
        strategy: ``"auto"``: clients are distributed over ranks, and every rank trains the server's models identically,
            to the bit; ``"ddp"``: ranks split the server's batches and sum their gradients, as Lightning's DDP does;
            ``"fsdp"``: every rank holds a shard of every model, with its gradients and its optimiser's state, and all
            ranks train all models together, one client after another.
        precision: Lightning's precision, e.g. ``"32-true"`` or ``"bf16-mixed"``.
        batch_size: samples per forward pass of `predict`.
        compile: run `predict` through ``torch.compile``.
        cache: folder of frozen models' predictions, kept across runs; None keeps them in memory.
        timeout: seconds that a process waits for the others of the run.
        launch: join the other processes of the run; False uses this process only, on one device.

    Attributes:
        ranks: the processes of the run.
        clock: wall time by part of a round.
        steps: chooses the strategy of a fit's steps, and keeps optimisers and compiled steps.
        sharder: shards models over ranks; None if models are not sharded.
        prediction_cache: predictions of frozen models.
        factories: functions that build an untrained module, by architecture.
        is_dry_run: True within `dry_run`.
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
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and none is read
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
        """Build a module on the device, with initial weights drawn from a seed; torch's random state does not change.

        Args:
            architecture: a key of `factories`.
            seed: seed of the initial weights.
        """
        module = self._build(architecture, seed)
        if self.sharder is not None:
            return self.sharder.place(module)
        module = self.fabric.to_device(module)
        ModelHandle(module)
        return module

    def first_weights(self, architecture: str, seed: int) -> dict[str, Tensor]:
        """Return the initial weights of `create` by name, in host memory.

        Args:
            architecture: a key of `factories`.
            seed: seed of the initial weights.
        """
        return module_state(self._build(architecture, seed))

    def _build(self, architecture: str, seed: int) -> LightningModule:
        """Build a module in host memory, in the recipe's precision."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = self.factories[architecture]()
        return self.fabric.strategy.precision.convert_module(module)

    def place(self, module: LightningModule) -> LightningModule:
        """Move a module to the device, in the recipe's precision."""
        return self.fabric.to_device(self.fabric.strategy.precision.convert_module(module))

    def shared_module(self, architecture: str) -> LightningModule:
        """Return the module that all clients of an architecture share, to inspect its structure.

        Its weights are those of the last borrower; only `borrow` makes them writable.

        Args:
            architecture: a key of `factories`.
        """
        if architecture not in self._shared:
            module = self._shared[architecture] = self.create(architecture, seed=0)
            handle_of(module).writable = False
        return self._shared[architecture]

    @contextmanager
    def borrow(self, architecture: str, weights: Mapping[str, Tensor] | None = None) -> Iterator[LightningModule]:
        """Borrow an architecture's shared module for the length of this context, to load and train it.

        Args:
            architecture: a key of `factories`.
            weights: tensors to load, by the names of `module_state`; None keeps the weights of the last borrower.

        Yields:
            The module.

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
            samples: training samples.
            config: epochs or steps, batch size, optimiser, schedule, clipping, and compilation of steps.
            generator: random stream of shuffles and augmentations.
            objective: loss to minimise; None: the module's own `training_step`.
            round: the current round, for schedules over rounds.
            watch: called after every step with the number of steps so far; True ends the fit. It may predict with the
                module.

        Returns:
            The mean over steps of every named loss; empty if no step was taken.
        """
        if self.is_dry_run or len(samples) == 0 or config.epochs == 0 or config.steps == 0:
            return {}
        parameters = trainable(module)
        if not parameters:  # e.g. a frozen teacher
            return {}
        step = self.steps.choose(module, parameters, objective or training_step, config)
        return train(step, samples, config, generator, round, watch)

    def all_ranks(self) -> AbstractContextManager[None]:
        """Mark a context in which all ranks train the same models; under DDP they split every batch."""
        return self.steps.all_ranks()

    # -- inference -----------------------------------------------------------------------------------------------

    def predict(self, module: nn.Module, samples: Samples, what: OutputSelector = "logits") -> Tensor:
        """Predict without gradients.

        Args:
            module: a module whose forward returns an `Output`.
            samples: n samples.
            what: the field of `Output` to collect, e.g. ``"logits"`` or ``"embedding"``, or a function of module and
                inputs whose result has the same shape for every batch except for the first dimension.

        Returns:
            float32 tensor on the CPU, [n, …].
        """
        # frozen models predict once: later rounds read from memory, later runs from the recipe's cache folder
        frozen = not trainable(module) and next(module.parameters(), None) is not None
        cache = self.prediction_cache if frozen else None
        with self.clock.part("extraction", within="clients"):
            if self.sharder is not None:
                return self.sharder.predict(module, samples, what, self.batch_size, cache)
            return predict(self.fabric, module, samples, what, self.batch_size, compile=self.compile, cache=cache)

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch to the device; to a GPU asynchronously."""
        return batch_to_device(batch, self.device)

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Disable `fit` within this context, so that messages can be built and measured without training."""
        self.is_dry_run = True
        try:
            yield
        finally:
            self.is_dry_run = False


def seed_everything(seed: int, purpose: str, round: int = 0, client: int = -1) -> None:
    """Seed torch's global random streams (dropout, initial weights) for one participant's turn.

    Args:
        seed: the recipe's seed.
        purpose: name of the stream.
        round: the current round.
        client: the client's id, -1 for the server.
    """
    number = stream_seed(seed, purpose, round, client)
    # torch.manual_seed formats a stack trace for every absent kind of device, which costs more than a training step
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
