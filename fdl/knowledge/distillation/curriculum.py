"""Curriculum: from samples that all clients know to samples that few of them know."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fdl.datamodules.samples import Samples
from fdl.errors import UserError
from fdl.knowledge.aggregation.means import AggregatedResponses
from fdl.modules.types import Batch
from fdl.recipe.config import Fit
from fdl.utils.arguments import at_least, one_of

PACINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "root": lambda t: math.sqrt(t),
    "step": lambda t: math.floor(4 * t) / 4,
}
"""Fraction of the withheld samples that are in use at time t in [0, 1]; root and linear of Platanios et al., 2019."""


class Curriculum:
    """Curriculum over proxy samples: first those on which clients agree with confidence, and the others later.

    Samples are ordered by the mean of two ranks: the distance of the clients' mean prediction from uniform (agreement),
    and the sum of their weights (confidence). A fraction of them, from the easy end, is in use at a time. Source:
    Bengio et al., "Curriculum Learning"; Platanios et al., "Competence-based Curriculum Learning" for the pacing.

    Args:
        by: measure of easiness.
        start: fraction of the samples in use at first, in (0, 1]; 1 switches the curriculum off.
        pacing: growth of the fraction to 1: linear, by the square root of time, or in four steps.
        over: whether it grows from round to round, or from step to step within each round.
        length: number of rounds, or percentage of the steps, after which all samples are in use.

    Raises:
        UserError: an argument is out of its range.
    """

    name = "curriculum"

    def __init__(
        self,
        by: Literal["agreement", "confidence", "both"] = "both",
        start: float = 0.5,
        pacing: Literal["linear", "root", "step"] = "root",
        over: Literal["rounds", "steps"] = "rounds",
        length: int = 5,
    ):
        self.by, self.over = one_of("by", by, ("agreement", "confidence", "both")), one_of("over", over, _OVER)
        if not 0 < start <= 1:
            raise UserError(f"start must be in (0, 1], got {start}")
        if over == "steps" and length > 100:
            raise UserError(f"length must be at most 100 percent of the steps, got {length}")
        self.start, self.pacing = float(start), one_of("pacing", pacing, PACINGS)
        self.length = at_least("length", length, 1)

    def share(self, time: float) -> float:
        """Fraction of the samples in use at a time.

        Args:
            time: 0 at the beginning, 1 when all samples are in use; clipped to this range.
        """
        return self.start + (1 - self.start) * PACINGS[self.pacing](min(max(time, 0.0), 1.0))

    def pace(
        self, samples: Samples, knowledge: AggregatedResponses, rows: Tensor | None, fit: Fit, round: int
    ) -> Samples:
        """Restrict samples to those in use in a round.

        Args:
            samples: proxy samples that the student learns.
            knowledge: aggregated predictions of the whole proxy set.
            rows: rows of the proxy set that the samples are, int64 [n]; None for all.
            fit: settings by which the student is trained on them.
            round: number of the round, from 1.
        """
        scores = difficulty(knowledge, self.by)
        order = torch.argsort(scores if rows is None else scores[rows], stable=True)
        return Paced(samples, order, _OVER[self.over](self, len(samples), fit, round))

    def _by_round(self, count: int, fit: Fit, round: int) -> Callable[[int], float]:
        share = self.share((round - 1) / self.length)
        return lambda step: share

    def _by_step(self, count: int, fit: Fit, round: int) -> Callable[[int], float]:
        steps = fit.steps if fit.steps is not None else fit.epochs * -(-count // fit.batch_size)
        return lambda step: self.share(step / max(steps * self.length / 100, 1))


_OVER = {"rounds": Curriculum._by_round, "steps": Curriculum._by_step}


def difficulty(knowledge: AggregatedResponses, by: str) -> Tensor:
    """Rank the rows of the proxy set from easy to hard.

    Args:
        knowledge: aggregated predictions of the rows.
        by: ``"agreement"``, ``"confidence"`` or ``"both"``.

    Returns:
        float [n] in [0, 1], 0 for the easiest row; of equal rows the first is the easier.
    """
    measures = {"agreement": knowledge.agreement, "confidence": knowledge.log_weight}
    chosen = list(measures.values()) if by == "both" else [measures[by]]
    ranks = [torch.argsort(torch.argsort(measure, descending=True, stable=True)).float() for measure in chosen]
    return torch.stack(ranks).mean(0) / max(len(knowledge.agreement) - 1, 1)


class Paced(Samples):
    """Samples of which only the first ones of an order are in use, more from batch to batch.

    Its length is that of all samples; an index of a sample that is not in use yet gives one that is. Once all are in
    use, every index gives its own sample.

    Args:
        samples: all samples.
        order: numbers of the samples from easy to hard, int64 [n].
        share: maps the number of earlier batches to the fraction of samples in use.
    """

    def __init__(self, samples: Samples, order: Tensor, share: Callable[[int], float]):
        self.samples, self.order, self.share = samples, order, share
        self._batches = 0

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> Tensor | None:
        """Labels of all samples."""
        return self.samples.labels

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return self.samples.nbytes

    def in_use(self) -> int:
        """Number of samples from which the next batch is taken, at least one."""
        return max(1, math.ceil(self.share(self._batches) * len(self) - 1e-9))

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """A batch of samples in use: position i in the order stands for i modulo their number."""
        count = self.in_use()
        if generator is not None:
            self._batches += 1
        return self.samples.batch(indices if count == len(self) else self.order[indices % count], generator)

    def subset(self, indices: Tensor) -> Samples:
        """The chosen samples, all in use."""
        return self.samples.subset(indices)

    def unlabelled(self) -> Samples:
        """All samples without labels."""
        return self.samples.unlabelled()

    def content_hash(self) -> str:
        """Hash of all inputs."""
        return self.samples.content_hash()
