"""Load balancing: assignment of a cohort's clients to ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SLACK = 1.1
"""Ratio to an equal share of the work up to which a rank keeps the clients whose state it holds."""


def largest_first(
    cohort: Iterable[int], costs: Sequence[float], ranks: int, homes: Sequence[int] | None = None
) -> dict[int, int]:
    """Assign the clients of a cohort to ranks, most expensive first, each to the rank with the least work.

    With `homes`, a client stays on its rank as long as that has no more than `SLACK` times an equal share of the work.

    Args:
        cohort: ids of the clients.
        costs: cost of each client, by id, in any unit.
        ranks: number of ranks.
        homes: the rank that holds each client's state, by id; None ignores it.

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
