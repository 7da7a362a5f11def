"""Rules that look at every coordinate by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.robust.base import RowRule
from fdl.robust.votes import UpdateBlock

_TINY = torch.finfo(torch.float64).tiny
_WINDOW = 1e-6
"""Share of the weight to either side of the middle whose mean is the median: where two meet there, it is of both."""


class TrimmedMean(RowRule):
    """Mean of what is left of every coordinate without the lowest and the highest share of the clients' weight.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", 2018. With equal weights and
    a whole number β n of clients at either end these are left out; a fraction counts in part, so that the result does
    not jump with the weights. Answers are put back on the simplex.

    Args:
        beta: β, the share at each side, in [0, 0.5); it must be no less than the share of Byzantine clients.
        max_client_share: as for every rule.

    Example:
        >>> import torch
        >>> from fdl.robust.votes import UpdateBlock
        >>> values = torch.tensor([1.0, 2.0, 3.0, 99.0], dtype=torch.float64).reshape(4, 1, 1)  # of four clients
        >>> shares = torch.full((4, 1), 0.25, dtype=torch.float64)
        >>> votes = UpdateBlock(shares, shares > 0, lambda: iter([values]))
        >>> value, weights = TrimmedMean(beta=0.25).combine(votes)
        >>> value  # the mean of 2 and 3
        tensor([[2.5000]], dtype=torch.float64)
    """

    name = "trimmed_mean"

    def __init__(self, beta: float = 0.2, max_client_share: float | None = 2.0):
        super().__init__(max_client_share)
        if not 0 <= beta < 0.5:
            raise UserError(f"beta must be in [0, 0.5), got {beta}")
        self.beta = beta

    def combine(self, votes: UpdateBlock) -> tuple[Tensor, Tensor]:
        """Sort each coordinate's values over clients and average those within the window of their summed weights."""
        values, kept, columns = [], torch.zeros_like(votes.shares), 0
        for x in votes.blocks():
            x = x.masked_fill(~votes.answered.unsqueeze(2), torch.inf)
            ordered, order = x.sort(dim=0, stable=True)
            shares = votes.shares.unsqueeze(2).expand_as(x).gather(0, order)
            lower, upper = _spans(ordered, shares)
            inside = (upper.clamp_max(1 - self.beta) - lower.clamp_min(self.beta)).clamp_min(0)
            weights = inside * shares / (upper - lower).clamp_min(_TINY)
            weights = weights / weights.sum(0).clamp_min(_TINY)
            values.append((weights * ordered.masked_fill(weights == 0, 0.0)).sum(0))
            kept += torch.zeros_like(x).scatter_(0, order, weights).sum(2)
            columns += x.shape[2]
        return torch.cat(values, dim=1), kept / columns


class Median(TrimmedMean):
    """Median of every coordinate, weighted by the clients' shares; the mean of the two in the middle where two are.

    Yin et al., 2018. Answers are put back on the simplex. A client's weight is the share of the coordinates that it
    decides.

    Args:
        max_client_share: as for every rule.

    Example:
        >>> import torch
        >>> from fdl.robust.votes import UpdateBlock
        >>> values = torch.tensor([1.0, 2.0, 3.0, 99.0], dtype=torch.float64).reshape(4, 1, 1)  # of four clients
        >>> shares = torch.full((4, 1), 0.25, dtype=torch.float64)
        >>> votes = UpdateBlock(shares, shares > 0, lambda: iter([values]))
        >>> value, weights = Median().combine(votes)
        >>> value
        tensor([[2.5000]], dtype=torch.float64)
    """

    name = "median"

    def __init__(self, max_client_share: float | None = 2.0):
        super().__init__(0.5 - _WINDOW, max_client_share)


def _spans(ordered: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the start and end of each value among the cumulative shares, both [n, R, d].

    Equal values are one, so that all who said it have a part in it.
    """
    upper = shares.cumsum(0)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    lower = (upper - shares).masked_fill(~new, -torch.inf).cummax(0).values
    upper = upper.masked_fill(~new.roll(-1, 0), torch.inf).flip(0).cummin(0).values.flip(0)
    return lower, upper
