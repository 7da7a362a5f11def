"""Client sampling: the cohort of a round."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from fdl.recipe.config import FederationConfig

_BLOCK = 32
"""Number of rounds whose cohorts are drawn at once."""


def sample_cohort(federation: FederationConfig, clients: int, seed: int, round: int) -> tuple[list[int], list[int]]:
    """Draw a round's cohort from a random stream of its own, so that it depends on the seed and the round alone.

    Args:
        federation: its `client_fraction`, the fraction of clients in a cohort, and `dropout`, the probability that a
            client of the cohort does not upload, are used.
        clients: number of clients.
        seed: the recipe's seed.
        round: the round.

    Returns:
        Ids of the cohort, and of those in it that drop out; both sorted.
    """
    block, place = divmod(round, _BLOCK)
    cohort, dropped = _sample_block(federation.client_fraction, federation.dropout, clients, seed, block)[place]
    return list(cohort), list(dropped)


@lru_cache(maxsize=4)
def _sample_block(
    client_fraction: float, dropout: float, clients: int, seed: int, block: int
) -> list[tuple[list[int], list[int]]]:
    """Draw the cohorts of several rounds: created one after another, generators take a tenth of the time each."""
    drawn, size = [], int(client_fraction * clients + 0.5)
    for round in range(_BLOCK * block, _BLOCK * (block + 1)):
        stream = numpy_stream(seed, "cohort", round)
        cohort = sorted(stream.choice(clients, size=size, replace=False).tolist())
        dropped = stream.random(size) < dropout
        drawn.append((cohort, [client for client, drops in zip(cohort, dropped) if drops]))
    return drawn
