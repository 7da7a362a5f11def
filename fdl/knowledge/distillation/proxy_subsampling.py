"""Fewer proxy samples a round: which ones, and what earlier rounds said of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl.messages import Responses
from fdl.participants import Participant, Server
from fdl.utils.arguments import at_least
from fdl.utils.seeding import torch_stream


def rows_of_round(participant: Participant, share: float) -> Tensor | None:
    """The proxy samples that are answered in the current round: every participant draws the same ones.

    Args:
        participant: gives seed, round and proxy set.
        share: of the proxy set, at least one sample.

    Returns:
        Sorted rows, int64 [m]; None for all.
    """
    if share == 1:
        return None
    count = len(participant.proxy)
    stream = torch_stream(participant.seed, "proxy rows", participant.round)
    return torch.randperm(count, generator=stream)[: max(1, round(share * count))].sort().values


class SoftLabelCache:
    """Each proxy sample's newest aggregated answer, as long as it is not too old; lies in the server's state.

    Source: the soft-label cache of SCARLET.

    Args:
        rounds: for how many rounds an answer counts, its own included; 1 needs no memory.
    """

    def __init__(self, rounds: int):
        self.rounds = at_least("soft_label_cache_rounds", rounds, 1)

    def update(self, server: Server, fresh: Responses) -> tuple[Tensor | None, Tensor]:
        """Take in a round's aggregated answers and return all that count.

        Args:
            server: whose state and round it is.
            fresh: answers of this round, to some rows or all.

        Returns:
            Rows of the proxy set, int64 [m], None for all; and their answers, [m, C].
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
