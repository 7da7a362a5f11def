"""How participants compute: precision, shared modules and the one training loop, on Lightning's Fabric.

Clients are moved to the device, never `fabric.setup`: under a distributed strategy that would average the gradients
of different institutions. There is one module per architecture, which a client borrows
for its turn and fills with its weights, so that memory on the device does not grow with the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdl.engine.batches import batches, gathered
from fdl.engine.compile import Compiler
from fdl.engine.distributed import launch_environment as clusters
from fdl.engine.distributed.batch_split import part_of
from fdl.engine.distributed.devices import fabric_of
from fdl.engine.distributed.process_group import ProcessGroup, nobody_came
from fdl.engine.inference import OutputSelector, map_tensors, predict, prefetch_to_device, to_device
from fdl.engine.optimizers import FitOptimizers, advance, schedule_of
from fdl.engine.prediction_cache import PredictionCache
from fdl.engine.vectorized.stacked_models import SMALL, unstackable
from fdl.engine.vectorized.step_recorder import StepTracer, TracedFit
from fdl.errors import UserError
from fdl.modules.objectives import Objective, Terms, training_step
from fdl.state.model_handle import ModelHandle, handle_of
from fdl.state.weights import count_parameters, module_state, trainable
from fdl.utils.seeding import stream_seed
from fdl.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.modules.types import Batch
    from fdl.recipe.config import Fit

TRACE_AFTER_STEPS = 100
"""Steps of one form after which it is recorded (`step_recorder`): what is saved is worth its cost after 1,000."""


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
        compiler: of training steps.
        optimizers: of fits.
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
            raise nobody_came(error, timeout) from error
        self.sharder = None
        self.ranks = ProcessGroup(self.fabric, timeout, sharded=launch and strategy == "fsdp")
        if self.ranks.sharded:
            from fdl.engine.distributed.sharding import Sharder

            self.sharder = Sharder(self.fabric, self.ranks)
        # there Fabric's wrappers add nothing but their own time, which small models feel
        alone = isinstance(self.fabric.strategy, SingleDeviceStrategy | DDPStrategy) and self.sharder is None
        self._plain = alone and precision == "32-true"
        self._shares, self.uses_all_ranks = strategy in ("ddp", "fsdp") and self.ranks.count > 1, False
        self.uses_all_ranks = self._shares and self.ranks.sharded
        self.batch_size, self.compile, self.answers = batch_size, compile, PredictionCache(cache)
        self.compiler = Compiler()
        self.is_dry_run, self.clock = False, Stopwatch()
        self.factories: dict[str, Callable[[], LightningModule]] = {}
        self._shared: dict[str, LightningModule] = {}
        self.optimizers = FitOptimizers(self.fabric, self.sharder)
        self._recorders: WeakKeyDictionary[nn.Module, StepTracer | None] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.fabric.device

    # -- modules -------------------------------------------------------------------------------------------------

    def create(self, architecture: str, seed: int) -> LightningModule:
        """Build a module with weights drawn from `seed`, on the device, leaving torch's random state as it was."""
        module = self._built(architecture, seed)
        if self.sharder is not None:
            return self.sharder.place(module)
        module = self.fabric.to_device(module)
        ModelHandle(module)
        return module

    def first_weights(self, architecture: str, seed: int) -> dict[str, Tensor]:
        """The weights of a module as `create` builds it, in host memory."""
        return module_state(self._built(architecture, seed))

    def _built(self, architecture: str, seed: int) -> LightningModule:
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
            watch: called after every step with the number of steps so far; True ends the fit. It may ask the module.

        Returns:
            The mean over steps of every named loss; empty when there was nothing to do.
        """
        if self.is_dry_run or len(samples) == 0 or config.epochs == 0 or config.steps == 0:
            return {}
        objective = objective or training_step
        parameters = trainable(module)
        if not parameters:  # a frozen teacher has nothing to learn
            return {}
        optimizer = self.optimizers.fresh(module, parameters, config)
        scheduler, interval = schedule_of(optimizer.optimizer, config, round)
        take_step = optimizer.optimizer.step if self._plain else optimizer.step
        if self.sharder is not None:
            take_step = partial(self.sharder.step, optimizer)
        skip_single = len(samples) % config.batch_size == 1 and any(isinstance(m, _BatchNorm) for m in module.modules())
        terms = self._terms(module, objective)
        within = objective if self.sharder is None else self.sharder.wrap_objective(objective)
        sums: dict[str, Tensor] = {}
        steps = 0
        if not module.training:  # walking over all submodules costs as much as a step of a small model
            module.train()
        recorded = self._recorded(module, objective, parameters) if config.compile == "none" and terms is None else None
        drawn = gathered(samples, batches(len(samples), config, generator, skip_single), generator)
        for epoch_ended, whole, batch, weight in self._batches(drawn, config, terms):
            step = partial(self._gradients, module, batch, weight)
            if recorded is not None:
                losses = recorded(partial(step, objective), batch)
            else:
                # the last batch of an epoch has a size of its own at every client, which is not worth compiling for
                losses = self.compiler.run(step, module, within, config.compile if whole else "none")
            if self.sharder is not None:
                self.sharder.finish_gradients(module, parameters, objective, config.gradient_clip)
            elif terms is not None:
                self.ranks.sum_gradients(parameters)
            if config.gradient_clip is not None and self.sharder is None:
                self.fabric.clip_gradients(module, optimizer, max_norm=config.gradient_clip, error_if_nonfinite=False)
            take_step()
            for parameter in parameters:
                parameter.grad = None
            for name, value in losses.items():
                value = value.detach()
                sums[name] = sums[name] + value if name in sums else value.clone()
            steps += 1
            if scheduler is not None and (interval == "step" or (interval == "epoch" and epoch_ended)):
                advance(scheduler, config)
            if watch is not None:
                if watch(steps):
                    break
                if not module.training:  # it was asked
                    module.train()
        if steps == 0:
            raise UserError(
                f"{len(samples)} sample(s) in batches of {config.batch_size} leave no batch of two, which batch "
                "normalisation needs; use a module with group normalisation or give each client more samples"
            )
        means = {name: float(value) / steps for name, value in sums.items()}
        if terms is None:
            return means
        together = torch.tensor(list(means.values()), dtype=torch.float64)
        self.ranks.sum(together)
        return dict(zip(means, together.tolist()))

    def _batches(
        self, drawn: Iterable[tuple[bool, Tensor, Batch]], config: Fit, terms: Terms | None
    ) -> Iterator[tuple[bool, bool, Batch, float | None]]:
        """Batches on the device: whether each ends an epoch, whether it is full, itself, and the share of its loss.

        A GPU's are gathered and copied while it works on those before.
        """
        convert = self.fabric.strategy.precision.convert_input

        def place(item: tuple[bool, Tensor, Batch]) -> tuple[bool, bool, Batch, float | None]:
            (epoch_ended, indices, batch), weight = item, None
            if terms is not None:
                batch, weight = part_of(batch, terms, self.ranks.index, self.ranks.count)
            return epoch_ended, len(indices) == config.batch_size, convert(self.to_device(batch)), weight

        return prefetch_to_device(self.device, place, drawn)

    def _gradients(
        self, module: nn.Module, batch: Batch, weight: float | None, objective: Objective
    ) -> Mapping[str, Tensor]:
        """One forward and one backward pass; the losses, each times a weight where there is one."""
        with self.fabric.autocast():
            losses = objective(module, batch)
        if weight is not None:
            losses = {name: value * weight for name, value in losses.items()}
        if self._plain:
            losses["loss"].backward()
        elif weight is not None and self.sharder is not None:
            self.fabric.backward(losses["loss"] * self.ranks.count)  # it takes the mean over ranks
        else:
            self.fabric.backward(losses["loss"])
        return losses

    def _recorded(
        self, module: nn.Module, objective: Objective, parameters: Sequence[nn.Parameter]
    ) -> TracedFit | None:
        """What writes a fit's steps down; None where that is not possible or not worth while."""
        if module not in self._recorders:
            small = count_parameters(module) <= SMALL.get(self.device.type, 0)
            self._recorders[module] = StepTracer() if self._plain and small and unstackable(module) is None else None
        recorder = self._recorders[module]
        recordings = None if recorder is None else recorder.begin(module, objective, TRACE_AFTER_STEPS)
        return None if recordings is None else TracedFit(recordings, module, objective, parameters)

    def _terms(self, module: nn.Module, objective: Objective) -> Terms | None:
        """What a loss is the mean of, where ranks may share the samples of a batch out (`fdl.terms`); None elsewhere.

        Batch normalisation, and losses that compare the samples of a batch, need the whole of it: then every rank
        trains on all, to the same result.
        """
        if not self.uses_all_ranks or any(isinstance(m, _BatchNorm) for m in module.modules()):
            return None
        return getattr(module.training_step if objective is training_step else objective, "terms", None)

    @contextmanager
    def all_ranks(self) -> Iterator[None]:
        """Within this context all ranks train the same models; under DDP they share the samples of every batch."""
        self.uses_all_ranks = self._shares
        try:
            yield
        finally:
            self.uses_all_ranks = self._shares and self.ranks.sharded

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
        cache = self.answers if frozen else None
        with self.clock.part("extraction", within="clients"):
            if self.sharder is not None:
                return self.sharder.predict(module, samples, what, self.batch_size, cache)
            return predict(self.fabric, module, samples, what, self.batch_size, compile=self.compile, cache=cache)

    def to_device(self, batch: Batch) -> Batch:
        """A batch on the device; a GPU gets it without anybody waiting for the copy."""
        if self.device.type == "cpu":
            return batch
        move = lambda tensor: to_device(tensor, self.device)  # noqa: E731
        return tuple(None if part is None else map_tensors(part, move) for part in batch)

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
