"""Selection of a fit's step strategy, and the objects that strategies keep from fit to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdl.engine.compile import Compiler
from fdl.engine.optimizers import FitOptimizers
from fdl.engine.steps.compiled import CompiledStep
from fdl.engine.steps.data_parallel import DataParallelStep
from fdl.engine.steps.sharded import ShardedDataParallelStep, ShardedStep
from fdl.engine.steps.traced import TRACE_AFTER_STEPS, TracedStep
from fdl.engine.tracing.step_recorder import StepTracer, TracedSteps
from fdl.engine.training_loop import EagerStep, StepStrategy
from fdl.engine.vectorized.stacked_models import SMALL, unstackable
from fdl.modules.objectives import Objective, Terms, marked_step, terms_of
from fdl.state.weights import count_parameters

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fdl.engine.distributed.process_group import ProcessGroup
    from fdl.engine.distributed.sharding import Sharder
    from fdl.recipe.config import Fit


class StepSelection:
    """Chooses the strategy of a fit by the run's devices, the recipe's ``compile`` and the objective.

    Args:
        fabric: a launched Fabric.
        ranks: the processes.
        sharder: shards models over ranks; None if models are not sharded.
        strategy: the recipe's ``fabric.strategy``.

    Attributes:
        optimizers: one per module and settings, reset for every fit.
        compiler: compiled objectives.
        uses_all_ranks: True while all ranks train the same models, and split every batch.
    """

    def __init__(self, fabric: Fabric, ranks: ProcessGroup, sharder: Sharder | None, strategy: str):
        self._fabric = fabric
        self._ranks = ranks
        self._sharder = sharder
        # in this case Fabric's wrappers have no effect but their overhead, which dominates for small models
        alone = isinstance(fabric.strategy, SingleDeviceStrategy | DDPStrategy) and sharder is None
        self._plain = alone and fabric.strategy.precision.precision == "32-true"
        self._shares = strategy in ("ddp", "fsdp") and ranks.count > 1
        self.uses_all_ranks = self._shares and ranks.sharded
        self.optimizers = FitOptimizers(fabric, sharder)
        self.compiler = Compiler()
        self._tracers: WeakKeyDictionary[nn.Module, StepTracer | None] = WeakKeyDictionary()

    def choose(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], objective: Objective, config: Fit
    ) -> StepStrategy:
        """Choose the strategy of a fit, with an optimiser that has taken no step yet.

        Args:
            module: the module to train.
            parameters: its parameters that are trained.
            objective: loss to minimise.
            config: its optimiser, clipping and `compile` are used.
        """
        optimizer = self.optimizers.fresh(module, parameters, config)
        eager = (self._fabric, module, parameters, objective, optimizer, config.gradient_clip, self._plain)
        terms = self._terms(module, objective)
        if self._sharder is not None:
            if terms is None:
                return ShardedStep(self._sharder, *eager)
            return ShardedDataParallelStep(self._sharder, self._ranks, terms, *eager)
        if terms is not None:
            step = DataParallelStep(self._ranks, terms, *eager)
        elif config.compile == "traced" and (traces := self._traces(module, objective)) is not None:
            return TracedStep(traces, *eager)
        else:
            step = EagerStep(*eager)
        return step if config.compile in ("none", "traced") else CompiledStep(step, self.compiler, config.compile)

    @contextmanager
    def all_ranks(self) -> Iterator[None]:
        """Mark a context in which all ranks train the same models; under DDP they split every batch."""
        self.uses_all_ranks = self._shares
        try:
            yield
        finally:
            self.uses_all_ranks = self._shares and self._ranks.sharded

    def _terms(self, module: nn.Module, objective: Objective) -> Terms | None:
        """Return the function that counts the terms of a loss, if ranks may split a batch; else None.

        Batch normalisation, and losses that compare the samples of a batch, need the whole batch: then every rank
        trains on all of it, with the same result.
        """
        if not self.uses_all_ranks or any(isinstance(m, _BatchNorm) for m in module.modules()):
            return None
        return terms_of(marked_step(module, objective))

    def _traces(self, module: nn.Module, objective: Objective) -> TracedSteps | None:
        """Return the traced steps of a module and kind of objective; None if these cannot be traced."""
        if module not in self._tracers:
            small = count_parameters(module) <= SMALL.get(self._fabric.device.type, 0)
            self._tracers[module] = StepTracer() if self._plain and small and unstackable(module) is None else None
        tracer = self._tracers[module]
        return None if tracer is None else tracer.begin(module, objective, TRACE_AFTER_STEPS)
