"""Batches split over ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fdl.modules.objectives import Terms, samples_of


def rank_share(batch: tuple, terms: Terms, rank: int, ranks: int) -> tuple[tuple, float]:
    """Select one rank's samples of a batch, and the weight of their loss in that of the whole batch.

    Args:
        batch: all samples, the same on every rank.
        terms: returns the number of terms that the loss of a batch is the mean of.
        rank: index of the rank.
        ranks: number of ranks.

    Returns:
        Every `ranks`-th sample; if there is none, the first sample with weight 0.
    """
    own = _each(batch, slice(rank, None, ranks))
    mine = terms(own) if samples_of(own) else 0
    return (own, mine / terms(batch)) if mine else (_each(batch, slice(1)), 0.0)


def _each(part: Any, rows: slice) -> Any:
    if isinstance(part, tuple):
        return tuple(_each(some, rows) for some in part)
    return part[rows] if isinstance(part, Tensor) else part
