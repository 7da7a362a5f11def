"""Robust rule that weights clients by their distances in earlier rounds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.robust.base import Plain, RobustRule
from fdl.robust.distance_based import GeometricMedian
from fdl.robust.votes import Aggregated, ClientUpdates
from fdl.utils.arguments import not_negative, one_of, positive

_TINY = torch.finfo(torch.float64).tiny
_NEAR = 1e-6
"""Distance that is none: clients that say the same to the last bit but one do not differ."""


class ExpGuard(RobustRule):
    """The mean, or a rule, with weights that shrink with a client's distance from what that rule makes of a round.

    Roux et al., "On the Byzantine-Resilience of Distillation-Based Federated Learning", 2024: w_i ← w_i exp(−η o_i),
    where o_i is client i's mean distance over rows from the other rule's result, and what comes out is the mean by
    these weights. Four choices are ours. Rows count in o_i by how much the client claims to know of them, so that it is
    judged where it wants to count. Distances are in units of the clients' median distance, so that η means the same in
    both spaces, and those up to a tolerance count for nothing: honest clients with other data than most must not be
    forgotten little by little. The past fades, so that whoever was unlucky can come back. And the rule may be asked
    again with the new weights, in the place of the mean: where liars can claim confidence, weights of the past alone
    cannot hold them.

    Args:
        rule: what distances are measured from; None is the geometric median.
        result: ``"mean"`` by shares times weights, or what the ``"rule"`` makes of these.
        eta: η > 0.
        tolerance: distance that is forgiven, in medians, ≥ 0; 0 is the paper's.
        fade: factor on the logarithms of old weights in every round, in (0, 1]; 1 is the paper's.
        limit: clients whose weight has fallen to exp(−limit) of the largest are left out, > 0.
    """

    name = "expguard"

    def __init__(
        self,
        rule: RobustRule | None = None,
        result: Literal["mean", "rule"] = "mean",
        eta: float = 2.0,
        tolerance: float = 1.5,
        fade: float = 0.9,
        limit: float = 6.0,
    ):
        self.rule, self.fade = rule or GeometricMedian(), fade
        super().__init__(self.rule.max_client_share)
        if not 0 < fade <= 1:
            raise UserError(f"fade must be in (0, 1], got {fade}")
        self.eta, self.limit = positive("eta", eta), positive("limit", limit)
        self.tolerance = not_negative("tolerance", tolerance)
        self.last = self.rule if one_of("result", result, ("mean", "rule")) == "rule" else Plain(self.max_client_share)

    @property
    def min_clients(self) -> int:
        """Least number of clients that the inner rule needs."""
        return self.rule.min_clients

    def decide(self, ballot: ClientUpdates) -> Aggregated:
        """Measure distances from the inner rule's result, update the weights, decide by them."""
        inner = self.rule.decide(ballot)
        if not inner.decided.any():
            return inner
        last = self.last.decide(ballot.reweighted(self._remember(ballot, self._distances(ballot, inner))))
        return Aggregated(last.values, last.weights.where(inner.decided, 0.0))

    def _distances(self, ballot: ClientUpdates, inner: Aggregated) -> Tensor:
        """Return clients' distances from the inner result, averaged over decided rows by its claims on them, [n]."""
        total, weight = (torch.zeros(len(ballot.clients), dtype=torch.float64) for _ in range(2))
        row = 0
        for votes in ballot.votes(self.max_client_share):
            column, squares = 0, torch.zeros_like(votes.shares)
            rows = slice(row, row + votes.shares.shape[1])
            for x in votes.blocks():
                squares += (x - inner.values[rows, column : column + x.shape[2]]).square().sum(2)
                column += x.shape[2]
            claims = votes.claims * inner.decided[rows]
            total += (claims * squares.sqrt()).sum(1)
            weight += claims.sum(1)
            row = rows.stop
        return total / weight.clamp_min(_TINY)

    def _remember(self, ballot: ClientUpdates, distances: Tensor) -> Tensor:
        """Update the weights in the server's state; returns those of the round's clients, [n]."""
        state = ballot.server.state
        before = state.get("robust", {}).get(ballot.memory, {})
        typical = distances.median().clamp_min(_NEAR)
        outliers = (distances / typical - self.tolerance).clamp(0, self.limit / self.eta)
        logs = {client: self.fade * log for client, log in before.items()}
        for client, outlier in zip(ballot.clients, outliers.tolist()):
            logs[str(client)] = logs.get(str(client), 0.0) - self.eta * outlier
        best = max(logs.values())
        logs = {client: max(log - best, -self.limit) for client, log in sorted(logs.items(), key=lambda x: int(x[0]))}
        state["robust"] = {**state.get("robust", {}), ballot.memory: logs}
        own = torch.tensor([logs[str(client)] for client in ballot.clients], dtype=torch.float64)
        return torch.where(own > -self.limit + 1e-9, own.exp(), 0.0)
