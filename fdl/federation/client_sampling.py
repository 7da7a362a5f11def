"""Who takes part in a round."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from fdl.recipe.config import Federation

_BLOCK = 32
"""Rounds whose cohorts are drawn at once."""


def sample_cohort(federation: Federation, clients: int, seed: int, round: int) -> tuple[list[int], list[int]]:
    """Draw a round's cohort from a stream of its own, so that it depends on the seed and the round alone.

    Args:
        federation: gives `client_fraction`, the share of clients that is asked, and `dropout`, the chance that one who
            was asked is not heard.
        clients: how many there are.
        seed: the recipe's seed.
        round: the round.

    Returns:
        Ids of those who are asked, and of those among them who drop out; both sorted.
    """
    block, place = divmod(round, _BLOCK)
    asked, lost = _sample_block(federation.client_fraction, federation.dropout, clients, seed, block)[place]
    return list(asked), list(lost)


@lru_cache(maxsize=4)
def _sample_block(
    client_fraction: float, dropout: float, clients: int, seed: int, block: int
) -> list[tuple[list[int], list[int]]]:
    """The cohorts of some rounds: a generator takes ten times as long to make and use when that was not just done."""
    drawn, size = [], int(client_fraction * clients + 0.5)
    for round in range(_BLOCK * block, _BLOCK * (block + 1)):
        stream = numpy_stream(seed, "cohort", round)
        asked = sorted(stream.choice(clients, size=size, replace=False).tolist())
        lost = stream.random(size) < dropout
        drawn.append((asked, [client for client, gone in zip(asked, lost) if gone]))
    return drawn
