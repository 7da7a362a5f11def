"""Subsampling of the proxy set per round, and a cache of soft labels of earlier rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl.messages import Responses
from fdl.participants import Participant, Server
from fdl.utils.arguments import at_least
from fdl.utils.seeding import torch_stream


def rows_of_round(participant: Participant, share: float) -> Tensor | None:
    """Draw the proxy samples that are predicted in the current round; every participant draws the same.

    Args:
        participant: gives seed, round and proxy set.
        share: fraction of the proxy set, in (0, 1]; at least one sample is drawn.

    Returns:
        Sorted rows, int64 [m]; None for all.
    """
    if share == 1:
        return None
    count = len(participant.proxy)
    stream = torch_stream(participant.seed, "proxy rows", participant.round)
    return torch.randperm(count, generator=stream)[: max(1, round(share * count))].sort().values


class SoftLabelCache:
    """Cache of each proxy sample's newest soft label until it expires, kept in the server's state.

    Source: the soft-label cache of SCARLET.

    Args:
        rounds: number of rounds for which a soft label is valid, including its own, ≥ 1; 1 needs no memory.
    """

    def __init__(self, rounds: int):
        self.rounds = at_least("soft_label_cache_rounds", rounds, 1)

    def update(self, server: Server, fresh: Responses) -> tuple[Tensor | None, Tensor]:
        """Store a round's soft labels, and return all that are valid.

        Args:
            server: keeps the cache in its state, and gives the round.
            fresh: soft labels of this round, for some rows or all.

        Returns:
            Rows of the proxy set, int64 [m], None for all; and their soft labels, [m, C].
        """
        if self.rounds == 1:
            return fresh.rows, fresh.values
        count = len(server.proxy)
        rows = torch.arange(count) if fresh.rows is None else fresh.rows
        before = server.state.get("cache")
        answers = fresh.values.new_zeros(count, fresh.values.shape[1]) if before is None else before["answers"].clone()
        since = torch.full((count,), -self.rounds) if before is None else before["round"].clone()
        answers[rows], since[rows] = fresh.values, server.round
        server.state["cache"] = {"answers": answers, "round": since}
        valid = since > server.round - self.rounds
        if bool(valid.all()):
            return None, answers
        rows = valid.nonzero().squeeze(1)
        return rows, answers[rows]
