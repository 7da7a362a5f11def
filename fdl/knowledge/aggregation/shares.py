"""Caps on the weight of one client in an aggregate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdl.errors import UserError

_EQUAL = 1e-9
"""Tolerance for rounding of a log-weight above the largest that is allowed."""

_GRID = 2.0**20
"""Steps of a shift per unit: so coarse that the order of additions does not change it."""

_ITERATIONS = 5000


@dataclass(frozen=True)
class Cap:
    """The most weight that one client can have through the log-weights that it declares.

    Where K_r clients predict row r, an equal share of it is 1/K_r. Over a round, a client has no more than `shares`
    times the sum of the equal shares of the rows that it predicts; over a row, no more than `shares` equal shares of
    any row. So one of K clients can move a row of a mean of probabilities by no more than ``√2 shares / K``: over a
    round on average over rows, over a row in each. Over a row the cap costs accuracy where only one client knows a
    class: the others, which do not, then have 1 − shares / K of its rows. Over a round an expert may have those rows
    for itself, since it claims less of others; and so may an attacker, but no more than ``shares / K`` of them.

    Args:
        shares: the multiple of an equal share, ≥ 1.
        over: whether the cap holds over a round or over each row.

    Raises:
        UserError: an argument has another value.
    """

    shares: float = 2.0
    over: Literal["round", "row"] = "round"

    def __post_init__(self) -> None:
        if not self.shares >= 1:
            raise UserError(f"max_client_share must be at least 1, an equal share, or null for none; got {self.shares}")
        if self.over not in ("round", "row"):
            raise UserError(f"max_client_share_over must be round or row, got {self.over!r}")

    @classmethod
    def of(cls, shares: float | None, over: Literal["round", "row"] = "round") -> Cap | None:
        """A cap, or None for no limit.

        Args:
            shares: the multiple of an equal share, ≥ 1; None for no limit.
            over: whether the cap holds over a round or over each row.
        """
        return None if shares is None else cls(shares, over)

    def limit(self, log_weights: Tensor) -> Tensor:
        """Lower log-weights until the cap holds; the result does not depend on the order of clients.

        Args:
            log_weights: float64 [K, R]; -inf in rows that a client does not predict.

        Returns:
            float64 [K, R]. Over a row, log-weights below the limit are unchanged; over a round all of a client's are
            lowered by one number, so that its own rows keep their ratios.

        Example:
            >>> import torch
            >>> log_weights = torch.tensor([[0.0], [0.0], [9.0]], dtype=torch.float64)  # one claims e⁹ times as much
            >>> torch.softmax(Cap(1.5, over="row").limit(log_weights), 0).flatten()
            tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
        """
        if len(log_weights) == 0 or log_weights.numel() == 0:
            return log_weights
        if self.over == "row":
            return torch.minimum(log_weights, max_log_weight(log_weights, self.shares))
        return log_weights - excess_log_weight(log_weights, self.shares).unsqueeze(1)


def excess_log_weight(log_weights: Tensor, cap: float) -> Tensor:
    """Least amounts by which clients' log-weights must fall to keep a cap over a round, float64 [K], ≥ 0.

    Of all weights that keep the cap these are the nearest to those declared, by the Kullback–Leibler divergence of
    shares: the shifts f ≤ 0 minimise Σ_r log Σ_i exp(l_ir + f_i) − Σ_i b_i f_i, b_i being a client's part of the rows.
    They are found by iterative scaling (Csiszár, "I-divergence geometry", 1975):
    f ← min(0, f + log b − log Σ_r shares).

    Args:
        log_weights: float64 [K, R]; -inf in rows that a client does not predict.
        cap: the multiple of an equal share, ≥ 1.
    """
    answered = torch.isfinite(log_weights)
    count = answered.sum(0).clamp_min(1).double()
    part = (answered * (cap / count).clamp_max(1.0)).sum(1)
    silent = part == 0
    part = part.masked_fill(silent, 1.0).log()
    known = log_weights[:, answered.any(0)]
    # start where the clients' mean levels would be cut, which is close even for a client that claims e^64 times as much
    level = torch.logsumexp(log_weights, 1) - answered.sum(1).clamp_min(1).double().log()
    shift = (torch.minimum(level, max_log_weight(level.unsqueeze(1), cap)) - level).masked_fill(silent, 0.0)
    for _ in range(_ITERATIONS):
        moved = known + shift.unsqueeze(1)
        had = torch.logsumexp(moved - torch.logsumexp(moved, 0), 1)
        new = (shift + part - had).clamp_max(0.0).masked_fill(silent, 0.0)
        change, shift = float((new - shift).abs().max()), new
        if change < 1 / (8 * _GRID):
            break
    return (-shift * _GRID).round() / _GRID


def max_log_weight(log_weights: Tensor, cap: float) -> Tensor:
    """The largest log-weight that a cap allows in each row, float64 [R]; infinite where no client exceeds it.

    With the m largest cut, the limit is L_m = log b + log Σ_{j>m} w_j − log (1 − m b), b = cap / K; m is the smallest
    number that leaves none above the limit.

    Args:
        log_weights: float64 [K, R]; -inf in rows that a client does not predict.
        cap: the multiple of an equal share, ≥ 1.
    """
    count = torch.isfinite(log_weights).sum(0)
    bound = (cap / count.clamp_min(1).double()).clamp_max(1.0)
    ordered = log_weights.sort(dim=0, descending=True).values
    rest, below = [], torch.full_like(bound, -torch.inf)
    for one in ordered.flip(0):  # sequential: the sum's bits must not depend on memory layout or threads
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


CAP = Cap()
"""The default cap."""
