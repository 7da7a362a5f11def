"""Who works where: clients placed so that no process waits long for another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SLACK = 1.1
"""How much longer than the fairest share a rank may work before a client that it has moves to another."""


def largest_first(
    cohort: Iterable[int], costs: Sequence[float], ranks: int, homes: Sequence[int] | None = None
) -> dict[int, int]:
    """Give every client of a cohort to a rank, the dearest first, each to the rank with the least to do.

    With `homes` a client stays with its rank as long as that works no longer than `SLACK` times the fairest share.

    Args:
        cohort: ids.
        costs: of all clients, by id, in any unit.
        ranks: how many there are.
        homes: the rank that has each client, by id.

    Returns:
        The rank of each client of the cohort.
    """
    order = sorted(cohort, key=lambda client: (-costs[client], client))
    fair = SLACK * sum(costs[client] for client in order) / ranks
    loads, placed = [0.0] * ranks, {}
    for client in order:
        rank = min(range(ranks), key=loads.__getitem__)
        if homes is not None and loads[homes[client]] + costs[client] <= fair:
            rank = homes[client]
        loads[rank] += costs[client]
        placed[client] = rank
    return placed
