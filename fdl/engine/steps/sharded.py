"""Steps on models of which every rank holds a part (``fabric.strategy: fsdp``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fdl.engine.distributed.process_group import ProcessGroup
from fdl.engine.steps.data_parallel import DataParallelStep
from fdl.engine.training_loop import EagerStep
from fdl.modules.objectives import Terms

if TYPE_CHECKING:
    from fdl.engine.distributed.sharding import Sharder


class ShardedStep(EagerStep):
    """A step for which FSDP gathers weights block by block, and averages gradients over ranks.

    Every rank computes the whole batch, unless it is a `ShardedDataParallelStep`.

    Args:
        sharder: holds what all ranks do together.
        eager: the arguments of `EagerStep`.
    """

    def __init__(self, sharder: Sharder, *eager: Any):
        super().__init__(*eager)
        self._sharder, self._gathering = sharder, sharder.wrap_objective(self.objective)

    def backward(self, placed: Any) -> Mapping[str, Tensor]:
        """As `EagerStep.backward`, with the weights that the objective needs gathered."""
        return self.gradients(self._gathering, placed)

    def update(self) -> None:
        """Make the ranks agree on gradients, clip them over all parts, let the optimiser step, and drop them."""
        self._sharder.finish_gradients(self.module, self.parameters, self.objective, self.gradient_clip)
        self._sharder.step(self.optimizer)
        for parameter in self.parameters:
            parameter.grad = None


class ShardedDataParallelStep(ShardedStep, DataParallelStep):
    """A sharded step of which every rank computes its share of the samples.

    Args:
        sharder: holds what all ranks do together.
        ranks: the processes.
        terms: how many terms the loss of a batch is the mean of.
        eager: the arguments of `EagerStep`.
    """

    def __init__(self, sharder: Sharder, ranks: ProcessGroup, terms: Terms, *eager: Any):
        super().__init__(sharder, ranks, terms, *eager)
        # FSDP takes the mean of gradients over ranks, and here the sum is wanted
        self.differentiate = lambda loss: self.fabric.backward(loss * ranks.count)
