"""What a robust rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fdl.knowledge.aggregation.shares import Cap
from fdl.robust.votes import Aggregated, ClientUpdates, UpdateBlock


class RobustRule(ABC):
    """Makes one vector a row of all clients' vectors; holds settings only.

    Every client's vector is needed at once, so memory grows with the number of clients, unlike that of a mean.

    Args:
        max_client_share: largest share of a proxy sample's weight that a client can claim by its confidence, as a
            multiple of an equal share, ≥ 1; what is cut off goes to the others in proportion. 1 ignores confidence,
            None trusts it: then one attacker can have a row for itself. The parameters of all clients count alike,
            whatever number of samples they claim.

    Attributes:
        uploads_per_attacker: how many more uploads a row needs for every attacker that is tolerated.
        extra_uploads: how many it needs besides those.
    """

    name: ClassVar[str]
    uploads_per_attacker: ClassVar[int] = 0
    extra_uploads: ClassVar[int] = 1

    def __init__(self, max_client_share: float | None = 2.0):
        Cap.of(max_client_share, "row")
        self.max_client_share = max_client_share

    @property
    def min_clients(self) -> int:
        """How many clients must say something of a row; with fewer, nothing is decided about it."""
        return self.extra_uploads

    @abstractmethod
    def decide(self, ballot: ClientUpdates) -> Aggregated:
        """Make up one vector for every row."""

    def rows(self, ballot: ClientUpdates, combine: Callable[[UpdateBlock], tuple[Tensor, Tensor]]) -> Aggregated:
        """Put together what is made of blocks of rows, without those that too few clients say something of.

        Args:
            ballot: all that clients say.
            combine: makes values [R, D] and weights [n, R] of some rows.
        """
        values, weights = [], []
        for votes in ballot.votes(self.max_client_share):
            combined, weighed = combine(votes)
            enough = votes.counts >= self.min_clients
            values.append(torch.where(enough.unsqueeze(1), combined, 0.0))
            weights.append(torch.where(enough, weighed, 0.0))
        return Aggregated(torch.cat(values), torch.cat(weights, dim=1))


class RowRule(RobustRule):
    """A rule for which every row stands by itself."""

    def decide(self, ballot: ClientUpdates) -> Aggregated:
        """Combine all rows."""
        return self.rows(ballot, self.combine)

    @abstractmethod
    def combine(self, votes: UpdateBlock) -> tuple[Tensor, Tensor]:
        """Values [R, D] and weights [n, R] of some rows."""


class WeighingRule(RowRule):
    """A rule that multiplies each client's vector by a number."""

    def combine(self, votes: UpdateBlock) -> tuple[Tensor, Tensor]:
        """The sum of vectors, each times its coefficient."""
        coefficients = self.coefficients(votes)
        return votes.total(coefficients), coefficients

    @abstractmethod
    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """What to multiply by, float64 [n, R], ≥ 0."""


class Plain(WeighingRule):
    """No rule: the mean by shares, for a dry run, in which nobody has learnt anything."""

    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """The shares."""
        return votes.shares
