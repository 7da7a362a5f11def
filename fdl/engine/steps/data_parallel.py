"""Steps whose batches are split over ranks, which sum their gradients (``fabric.strategy: ddp``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fdl.engine.distributed.batch_split import rank_share
from fdl.engine.distributed.process_group import ProcessGroup
from fdl.engine.training_loop import EagerStep
from fdl.modules.objectives import Objective, Terms
from fdl.modules.types import Batch


class DataParallelStep(EagerStep):
    """A step of which every rank computes its share of the samples.

    Args:
        ranks: the processes.
        terms: how many terms the loss of a batch is the mean of, so that the ranks' losses can be weighted.
        eager: the arguments of `EagerStep`.
    """

    def __init__(self, ranks: ProcessGroup, terms: Terms, *eager: Any):
        super().__init__(*eager)
        self._ranks, self._terms = ranks, terms

    def place(self, batch: Batch, full: bool) -> tuple[Batch, float]:
        """Move this rank's samples to the device; also return the weight of their loss in that of the batch."""
        own, weight = rank_share(batch, self._terms, self._ranks.index, self._ranks.count)
        return super().place(own, full), weight

    def gradients(self, objective: Objective, placed: tuple[Batch, float]) -> Mapping[str, Tensor]:
        """As `EagerStep.gradients`; losses are this rank's part of the batch's, gradients are not summed yet."""
        batch, weight = placed
        with self.fabric.autocast():
            losses = objective(self.module, batch)
        losses = {name: value * weight for name, value in losses.items()}
        self.differentiate(losses["loss"])
        return losses

    def update(self) -> None:
        """Sum the gradients of all ranks; then as `EagerStep.update`."""
        self._ranks.sum_gradients(self.parameters)
        super().update()

    def reduce_losses(self, means: dict[str, float]) -> dict[str, float]:
        """Sum the ranks' parts of the losses."""
        together = torch.tensor(list(means.values()), dtype=torch.float64)
        self._ranks.sum(together)
        return dict(zip(means, together.tolist()))
