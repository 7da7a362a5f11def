"""Who takes part in a round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdl.seeding import numpy_stream

if TYPE_CHECKING:
    from fdl.recipe import Federation


def draw(federation: Federation, clients: int, seed: int, round: int) -> tuple[list[int], list[int]]:
    """Draw a round's cohort from a stream of its own, so that it depends on the seed and the round alone.

    Args:
        federation: gives `participation`, the share of clients that is asked, and `dropout`, the chance that one who
            was asked is not heard.
        clients: how many there are.
        seed: the recipe's seed.
        round: the round.

    Returns:
        Ids of those who are asked, and of those among them who drop out; both sorted.
    """
    size = int(federation.participation * clients + 0.5)
    stream = numpy_stream(seed, "cohort", round)
    asked = sorted(stream.choice(clients, size=size, replace=False).tolist())
    lost = stream.random(size) < federation.dropout
    return asked, [client for client, gone in zip(asked, lost) if gone]
