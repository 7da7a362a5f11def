"""What the loss of a batch is the mean of, and so how ranks may share a batch out among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Step = TypeVar("Step", bound=Callable)
Terms = Callable[[tuple], int]
"""How many terms the loss of a batch is the mean of."""


def mean_over(terms: Terms) -> Callable[[Step], Step]:
    """Mark an objective or a training step: every loss it returns is a mean over so many terms of the batch alone.

    A loss that compares a batch's samples with each other must not be marked.
    """

    def mark(step: Step) -> Step:
        step.terms = terms
        return step

    return mark


def samples_of(batch: tuple) -> int:
    """How many samples a batch has."""
    inputs = batch[0]
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)


def next_tokens_of(batch: tuple) -> int:
    """How many tokens of a batch of texts follow another one."""
    return int((batch[0][:, 1:] >= 0).sum())


def part_of(batch: tuple, terms: Terms, rank: int, ranks: int) -> tuple[tuple, float]:
    """One rank's samples of a batch, and the share of its loss in that of the whole batch.

    Args:
        batch: all samples, the same on every rank.
        terms: how many terms the loss of a batch is the mean of.
        rank: which.
        ranks: how many there are.

    Returns:
        Every `ranks`-th sample; where that is none, a sample of another rank's with share 0.
    """
    own = _each(batch, slice(rank, None, ranks))
    mine = terms(own) if samples_of(own) else 0
    return (own, mine / terms(batch)) if mine else (_each(batch, slice(1)), 0.0)


def _each(part: Any, rows: slice) -> Any:
    if isinstance(part, tuple):
        return tuple(_each(some, rows) for some in part)
    return part[rows] if isinstance(part, Tensor) else part
