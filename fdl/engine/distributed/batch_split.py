"""Batches split over ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fdl.modules.objectives import Terms, samples_of


def rank_share(batch: tuple, terms: Terms, rank: int, ranks: int) -> tuple[tuple, float]:
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
