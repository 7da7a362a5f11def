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
    """A step in which every rank computes its share of the samples.

    Args:
        ranks: the processes.
        terms: returns the number of terms that the loss of a batch is the mean of, to weight the ranks' losses.
        eager: the arguments of `EagerStep`.
    """

    def __init__(self, ranks: ProcessGroup, terms: Terms, *eager: Any):
        super().__init__(*eager)
        self._ranks, self._terms = ranks, terms

    def place(self, batch: Batch, full: bool) -> tuple[Batch, float]:
        """Move this rank's samples to the device; also return the weight of their loss in that of the batch.

        Args:
            batch: a batch in host memory, the same on all ranks.
            full: True if it has as many samples as the recipe's batch size.
        """
        own, weight = rank_share(batch, self._terms, self._ranks.index, self._ranks.count)
        return super().place(own, full), weight

    def gradients(self, objective: Objective, placed: tuple[Batch, float]) -> Mapping[str, Tensor]:
        """Run a forward and a backward pass over this rank's samples; gradients are not summed over ranks yet.

        Args:
            objective: the step's objective, or another form of it.
            placed: the result of `place`.

        Returns:
            This rank's terms of the named losses, which `reduce_losses` sums.
        """
        batch, weight = placed
        with self.fabric.autocast():
            losses = objective(self.module, batch)
        losses = {name: value * weight for name, value in losses.items()}
        self.differentiate(losses["loss"])
        return losses

    def update(self) -> None:
        """Sum the gradients over ranks, clip them, take an optimiser step, and drop them."""
        self._ranks.sum_gradients(self.parameters)
        super().update()

    def reduce_losses(self, means: dict[str, float]) -> dict[str, float]:
        """Sum the ranks' terms of the losses.

        Args:
            means: the terms of this rank.

        Returns:
            The mean losses.
        """
        sums = torch.tensor(list(means.values()), dtype=torch.float64)
        self._ranks.sum(sums)
        return dict(zip(means, sums.tolist()))
