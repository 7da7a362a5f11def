"""How much weight one client may have in what several say together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdl.errors import UserError

_EQUAL = 1e-9
"""By how much rounding may carry a log-weight above the largest that is allowed."""

_GRID = 2.0**20
"""Steps of a shift in a unit: so coarse that no order of additions shows in it."""

_ITERATIONS = 5000


@dataclass(frozen=True)
class Cap:
    """The most weight that one client can have by what it declares.

    Where K_r clients answer row r, an equal share of it is 1/K_r. A client is given no more than `shares` times the sum
    of the equal shares of the rows that it answers (over a round), or of no row more than `shares` equal shares (over a
    row). So of K clients one can move a row of a mean of probabilities by no more than ``√2 shares / K``, over a round
    on average over rows, over a row in each. Over a row it costs much where only one client knows a class: the others,
    who do not, then have 1 − shares / K of its rows. Over a round an expert may have those rows for itself, since it
    claims others less; and so may a liar, but no more than ``shares / K`` of them.

    Args:
        shares: the multiple, ≥ 1.
        over: a round or each row.

    Raises:
        UserError: for other values.
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
        """A cap, or None for none; arguments as of the class."""
        return None if shares is None else cls(shares, over)

    def limit(self, log_weights: Tensor) -> Tensor:
        """Lower log-weights until the cap holds; they are the same whatever the order of clients.

        Args:
            log_weights: float64 [K, R]; -inf where a client says nothing.

        Returns:
            float64 [K, R]. Over a row those below the limit stay as they are; over a round all of a client's are lower
            by one number, so that its rows stand to each other as it said.

        Example:
            >>> import torch
            >>> log_weights = torch.tensor([[0.0], [0.0], [9.0]], dtype=torch.float64)  # one claims e⁹ times as much
            >>> torch.softmax(Cap(1.5, over="row").limit(log_weights), 0).flatten()
            tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
        """
        if len(log_weights) == 0 or log_weights.numel() == 0:
            return log_weights
        if self.over == "row":
            return torch.minimum(log_weights, ceiling(log_weights, self.shares))
        return log_weights - excess(log_weights, self.shares).unsqueeze(1)


def excess(log_weights: Tensor, cap: float) -> Tensor:
    """By how much each client's log-weights must fall so that no client exceeds its part of a round, float64 [K], ≥ 0.

    Of all weights that keep the cap these are the nearest to those declared, by the Kullback–Leibler divergence of
    shares: the shifts f ≤ 0 minimise Σ_r log Σ_i exp(l_ir + f_i) − Σ_i b_i f_i, b_i being a client's part of the rows.
    They are found by iterative scaling (Csiszár, "I-divergence geometry", 1975):
    f ← min(0, f + log b − log Σ_r shares).

    Args:
        log_weights: as for `Cap.limit`.
        cap: equal shares.
    """
    answered = torch.isfinite(log_weights)
    count = answered.sum(0).clamp_min(1).double()
    part = (answered * (cap / count).clamp_max(1.0)).sum(1)
    silent = part == 0
    part = part.masked_fill(silent, 1.0).log()
    known = log_weights[:, answered.any(0)]
    # begin where the clients' mean levels would be cut: one that claims e^64 times as much is then near at once
    level = torch.logsumexp(log_weights, 1) - answered.sum(1).clamp_min(1).double().log()
    shift = (torch.minimum(level, ceiling(level.unsqueeze(1), cap)) - level).masked_fill(silent, 0.0)
    for _ in range(_ITERATIONS):
        moved = known + shift.unsqueeze(1)
        had = torch.logsumexp(moved - torch.logsumexp(moved, 0), 1)
        new = (shift + part - had).clamp_max(0.0).masked_fill(silent, 0.0)
        change, shift = float((new - shift).abs().max()), new
        if change < 1 / (8 * _GRID):
            break
    return (-shift * _GRID).round() / _GRID


def ceiling(log_weights: Tensor, cap: float) -> Tensor:
    """The largest log-weight that a row allows, float64 [R]; infinite where nobody exceeds it.

    With the m largest cut, the limit is L_m = log b + log Σ_{j>m} w_j − log (1 − m b), b = cap / K; the fewest are cut
    that leave none above it.

    Args:
        log_weights: as for `Cap.limit`.
        cap: equal shares, ≥ 1.
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


CAP = Cap()
"""What holds where nothing else is said."""
