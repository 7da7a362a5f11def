"""Noisy votes: the student learns classes that the specialists elect, and never how many voted for which."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.release import Release
from fdl.messages import Responses
from fdl.participants import Client, Server
from fdl.privacy.accounting import event
from fdl.privacy.release import PrivateAggregate, add_noise, released_only, spend_or_refuse
from fdl.utils.arguments import not_negative


class NoisyVotes(Release):
    """PATE's noisy arg max of votes (GNMax), with its check that enough agree (Confident-GNMax).

    A client sends of every proxy row the likeliest class, for which the codec `one_hot` takes a byte or two. The server
    counts, adds noise N(0, σ²) to every count, and releases the class that then has the most. With a `threshold` T only
    rows with ``max count + N(0, σ₁²) ≥ T`` are answered at all; the others are left out of the student's lesson, and of
    the price of an answer. The server has to be trusted with the votes.

    An institution that votes for another class moves the counts of a row by √2 (L2), and the largest of them by 1. So a
    GNMax answer is a Gaussian mechanism with noise multiplier σ/√2, (α, α/σ²)-RDP, and a check one with σ₁,
    (α, α/(2σ₁²))-RDP: a check is paid for every row, an answer for those that passed. The tighter bounds that depend
    on the votes are themselves private, and are not used.

    Source: Papernot et al., "Scalable private learning with PATE" (2018).

    Args:
        noise: σ, in votes; at 0 the plurality is released, and nothing is private.
        threshold: T, in votes; None answers all.
        threshold_noise: σ₁, in votes; goes with a threshold.
    """

    name = "noisy_votes"
    by = "server"
    space = "probabilities"

    def __init__(self, noise: float, threshold: float | None = None, threshold_noise: float | None = None):
        self.noise, self.threshold = not_negative("noise", noise), threshold
        if (threshold is None) != (threshold_noise is None):
            raise UserError("threshold and threshold_noise go together: one is missing")
        self.threshold_noise = None if threshold_noise is None else not_negative("threshold_noise", threshold_noise)

    def message(self, client: Client, said: Responses, log_weights: Tensor | None) -> Responses:
        """Return one vote per row, as a one-hot row."""
        votes = torch.nn.functional.one_hot(said.values.argmax(1), said.values.shape[1])
        return Responses(votes.float(), "probabilities", said.rows)

    def collect(self, mean: ResponseMean, server: Server, rows: Tensor | None) -> PrivateAggregate:
        """The server's ballot box."""

        def release(knowledge: AggregatedResponses, clients: int) -> AggregatedResponses | None:
            asked = torch.arange(len(knowledge.values)) if rows is None else rows
            tally = (knowledge.values.double() * knowledge.coverage.unsqueeze(1))[asked]
            passed = self._passed(server, tally)
            if passed is None:
                return None
            server.metrics["privacy/rows"] = float(passed.sum())
            answers = event("gnmax", self.noise / math.sqrt(2), count=int(passed.sum()), level="institution")
            if not passed.any() or not spend_or_refuse(server, answers):
                return None
            elected = add_noise(tally[passed], self.noise, server.noise("release")).argmax(1)
            labels = torch.nn.functional.one_hot(elected, tally.shape[1])
            return released_only(knowledge, asked[passed], labels, clients)

        return PrivateAggregate(mean, _ballot, release)

    def _passed(self, server: Server, tally: Tensor) -> Tensor | None:
        """Return the mask of rows that are released, bool [n]; None if the budget does not allow the check."""
        if self.threshold is None:
            return torch.ones(len(tally), dtype=torch.bool)
        if not spend_or_refuse(
            server, event("gnmax_check", self.threshold_noise, count=len(tally), level="institution")
        ):
            return None
        return add_noise(tally.amax(1), self.threshold_noise, server.noise("threshold")) >= self.threshold


def _ballot(responses: Responses) -> Responses:
    """Any point of the simplex will do: two are √2 apart at most, as two votes are. The mean checks that it is one."""
    if responses.form != "probabilities":
        raise RejectedMessageError(f"expected votes, got {responses.form}")
    return responses
