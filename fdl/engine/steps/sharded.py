"""Steps on sharded models (``fabric.strategy: fsdp``)."""

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
    """A step in which FSDP gathers weights block by block, and averages gradients over ranks.

    Every rank computes the whole batch, except in a `ShardedDataParallelStep`.

    Args:
        sharder: runs the operations that involve all ranks.
        eager: the arguments of `EagerStep`.
    """

    def __init__(self, sharder: Sharder, *eager: Any):
        super().__init__(*eager)
        self._sharder, self._gathering = sharder, sharder.wrap_objective(self.objective)

    def backward(self, placed: Any) -> Mapping[str, Tensor]:
        """Run a forward and a backward pass, with the weights that the objective needs gathered.

        Args:
            placed: the result of `place`.

        Returns:
            The named losses.
        """
        return self.gradients(self._gathering, placed)

    def update(self) -> None:
        """Average gradients over ranks, clip them by their norm over all shards, take an optimiser step, drop them."""
        self._sharder.finish_gradients(self.module, self.parameters, self.objective, self.gradient_clip)
        self._sharder.step(self.optimizer)
        for parameter in self.parameters:
            parameter.grad = None


class ShardedDataParallelStep(ShardedStep, DataParallelStep):
    """A sharded step in which every rank computes its share of the samples.

    Args:
        sharder: runs the operations that involve all ranks.
        ranks: the processes.
        terms: returns the number of terms that the loss of a batch is the mean of.
        eager: the arguments of `EagerStep`.
    """

    def __init__(self, sharder: Sharder, ranks: ProcessGroup, terms: Terms, *eager: Any):
        super().__init__(sharder, ranks, terms, *eager)
        # FSDP averages gradients over ranks, but the ranks' losses are terms of a sum
        self.differentiate = lambda loss: self.fabric.backward(loss * ranks.count)
