"""Base classes of robust aggregation rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fdl.knowledge.aggregation.shares import Cap
from fdl.robust.votes import Aggregated, ClientUpdates, UpdateBlock


class RobustRule(ABC):
    """Aggregation of all clients' vectors to one vector per row; holds settings only.

    Every client's vector is needed at once, so memory grows with the number of clients, unlike that of a mean.

    Args:
        max_client_share: largest share of a proxy sample's weight that a client can claim by its confidence, as a
            multiple of an equal share, ≥ 1; what is cut off goes to the others in proportion. 1 ignores confidence,
            None trusts it: then one attacker can have a row for itself. The parameters of all clients count alike,
            whatever number of samples they claim.

    Attributes:
        uploads_per_attacker: number of additional uploads that a row needs per tolerated attacker.
        extra_uploads: number of uploads that a row needs besides those.
    """

    name: ClassVar[str]
    uploads_per_attacker: ClassVar[int] = 0
    extra_uploads: ClassVar[int] = 1

    def __init__(self, max_client_share: float | None = 2.0):
        Cap.of(max_client_share, "row")
        self.max_client_share = max_client_share

    @property
    def min_clients(self) -> int:
        """Least number of clients with a vector for a row; with fewer, the row is left undecided."""
        return self.extra_uploads

    @abstractmethod
    def decide(self, ballot: ClientUpdates) -> Aggregated:
        """Aggregate the clients' vectors to one vector per row."""

    def rows(self, ballot: ClientUpdates, combine: Callable[[UpdateBlock], tuple[Tensor, Tensor]]) -> Aggregated:
        """Aggregate block by block of rows, leaving out rows for which too few clients have a vector.

        Args:
            ballot: the clients' vectors.
            combine: aggregates a block of R rows to values [R, D] and weights [n, R].
        """
        values, weights = [], []
        for votes in ballot.votes(self.max_client_share):
            combined, weighed = combine(votes)
            enough = votes.counts >= self.min_clients
            values.append(torch.where(enough.unsqueeze(1), combined, 0.0))
            weights.append(torch.where(enough, weighed, 0.0))
        return Aggregated(torch.cat(values), torch.cat(weights, dim=1))


class RowRule(RobustRule):
    """Rule that aggregates every row independently."""

    def decide(self, ballot: ClientUpdates) -> Aggregated:
        """Combine all rows."""
        return self.rows(ballot, self.combine)

    @abstractmethod
    def combine(self, votes: UpdateBlock) -> tuple[Tensor, Tensor]:
        """Return values [R, D] and weights [n, R] of a block of rows."""


class WeighingRule(RowRule):
    """Rule that sums clients' vectors, each multiplied by a coefficient."""

    def combine(self, votes: UpdateBlock) -> tuple[Tensor, Tensor]:
        """Return the sum of vectors, each times its coefficient, and the coefficients."""
        coefficients = self.coefficients(votes)
        return votes.total(coefficients), coefficients

    @abstractmethod
    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """Return the coefficients, float64 [n, R], ≥ 0."""


class Plain(WeighingRule):
    """Plain mean by shares, for a dry run, in which no client has learnt anything."""

    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """Return the shares."""
        return votes.shares
