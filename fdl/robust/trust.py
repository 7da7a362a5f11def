"""Robust rule that weights clients by their agreement with the server's own update."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.robust.base import RobustRule
from fdl.robust.distance_based import GeometricMedian
from fdl.robust.votes import Aggregated, ClientUpdates, UpdateBlock
from fdl.utils.arguments import one_of

_TINY = torch.finfo(torch.float64).tiny


class FLTrust(RobustRule):
    """Weights of clients by agreement with the direction of the server's own vector: relu(cos(g_i, g_0)).

    Cao et al., "FLTrust", 2021. In the space of parameters g_0 is what the `local_training` settings make of the global
    model on the server's labelled samples, and every update is scaled to its length. In the space of knowledge it is
    what a model that knew these samples alone would answer; the cosine is taken over all rows at once, each row
    weighted by how much the client claims to know of it against the others, so that it is judged where it wants to
    count: whoever knows one class alone, and says so by its confidence, is judged by that class. Answers on the simplex
    keep their length. The server's labelled samples are its `public` ones, else those for validation. A model for
    reference is trained on them; the student learns nothing from it, but by whom it listens to.

    Args:
        judge: ``"server"``, or ``"peers"``: the geometric median of what all clients say, with their capped shares, for
            a server without labelled samples.
        least: share of the clients' median trust below which a client is not heard, in [0, 1): its confidence might
            else make up for the trust that it lacks. 0 is the paper's. On digits, the best of those who flip signs
            was given 0.27 of the median client's weight, and no honest one less than 0.53.
        max_client_share: as for every rule; trust takes its place in the space of knowledge.
    """

    name = "fltrust"

    def __init__(
        self, judge: Literal["server", "peers"] = "server", least: float = 0.4, max_client_share: float | None = None
    ):
        super().__init__(max_client_share)
        if not 0 <= least < 1:
            raise UserError(f"least must be in [0, 1), got {least}")
        self.floor = least
        self.judge = one_of("judge", judge, ("server", "peers"))

    def decide(self, ballot: ClientUpdates) -> Aggregated:
        """Measure every client over all rows, then average by shares times trust."""
        trust, scale = self._trust(ballot)

        def combine(votes: UpdateBlock) -> tuple[Tensor, Tensor]:
            weights = votes.shares * trust.unsqueeze(1)
            weights = weights / weights.sum(0).clamp_min(_TINY)
            return votes.total(weights * scale.unsqueeze(1)), weights

        return self.rows(ballot, combine)

    def _trust(self, ballot: ClientUpdates) -> tuple[Tensor, Tensor]:
        """The positive cosines, and what brings each client's vector to the server's length, both [n]."""
        wanted = ballot.reference() if self.judge == "server" else GeometricMedian().decide(ballot).values
        inner, own, ours = (torch.zeros(len(ballot.clients), dtype=torch.float64) for _ in range(3))
        row = 0
        for votes in ballot.votes(self.max_client_share):
            column, count = 0, votes.shares.shape[1]
            for x in votes.blocks():
                part = wanted[row : row + count, column : column + x.shape[2]]
                inner += (votes.claims * torch.einsum("nrd,rd->nr", x, part)).sum(1)
                own += (votes.claims * x.square().sum(2)).sum(1)
                ours += (votes.claims * part.square().sum(1)).sum(1)
                column += x.shape[2]
            row += count
        trust = (inner / (own * ours).sqrt().clamp_min(_TINY)).clamp(0, 1)
        scale = torch.ones_like(own) if ballot.bounded else (ours / own.clamp_min(_TINY)).sqrt()
        return trust.where(trust >= self.floor * trust.median(), 0.0), scale
