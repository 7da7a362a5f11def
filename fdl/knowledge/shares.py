"""How much of a row's weight one client may have."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl.errors import UserError

CAP = 2.0
"""Equal shares of a row that one client may have at most where a recipe says nothing else."""

_EQUAL = 1e-9
"""By how much rounding may carry a log-weight above the largest that is allowed."""


def checked_cap(cap: float | None) -> float | None:
    """Return a cap.

    Args:
        cap: equal shares that one client may have of a row; None for any.

    Raises:
        UserError: it is below 1, an equal share.
    """
    if cap is not None and not cap >= 1:
        raise UserError(f"cap must be at least 1, an equal share, or null for none; got {cap}")
    return cap


def limited(log_weights: Tensor, cap: float | None) -> Tensor:
    """Cut log-weights so that no client has more than a multiple of an equal share of a row.

    Where K clients answer a row, ``w_i ≤ (cap / K) Σ_j w_j`` holds for the weights ``exp`` of what is returned, and a
    client can move the row's mean of probabilities by no more than ``√2 cap / K``, whatever it declares. Up to `cap`
    clients may have a row for themselves: the bound is then 1. Those below the limit keep their log-weights, so that
    they stand to each other as they did.

    Args:
        log_weights: float64 [K, R]; -inf where a client says nothing.
        cap: the multiple, ≥ 1; 1 is the mean of all alike, None cuts nothing.

    Returns:
        float64 [K, R]; the same whatever the order of clients.
    """
    return log_weights if cap is None else torch.minimum(log_weights, ceiling(log_weights, cap))


def ceiling(log_weights: Tensor, cap: float) -> Tensor:
    """The largest log-weight that a row allows, float64 [R]; infinite where nobody exceeds it.

    With the m largest cut, the limit is L_m = log b + log Σ_{j>m} w_j − log (1 − m b), b = cap / K; the fewest are cut
    that leave none above it.

    Args:
        log_weights: as for `limited`.
        cap: as for `limited`.
    """
    count = torch.isfinite(log_weights).sum(0)
    bound = (cap / count.clamp_min(1).double()).clamp_max(1.0)
    ordered = log_weights.sort(dim=0, descending=True).values
    rest, below = [], torch.full_like(bound, -torch.inf)
    for one in ordered.flip(0):  # one after the other: a sum over clients whose bits no layout or thread can move
        below = torch.logaddexp(below, one)
        rest.append(below)
    level, above = torch.full_like(bound, torch.inf), count > 0
    for cut, (largest, below) in enumerate(zip(ordered, reversed(rest))):
        limit = bound.log() + below - (1 - cut * bound).clamp_min(torch.finfo(torch.float64).tiny).log()
        fits = largest <= limit + _EQUAL
        if cut:
            level = torch.where(above & fits, limit, level)
        above = above & ~fits
        if not bool(above.any()):
            break
    return level
