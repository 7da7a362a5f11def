"""Sizes of the clients' shares: proportional and equal counts, and groups merged or divided to a number of clients."""

from __future__ import annotations

import heapq

import numpy as np


def split_by_shares(shares: np.ndarray, total: np.ndarray | int) -> np.ndarray:
    """Turn shares into whole counts that sum to a total per row; the cumulated shares are rounded, so none is lost.

    Args:
        shares: rows that sum to one, [R, K].
        total: number of items to share out per row, [R, 1], or one number for all rows.

    Returns:
        Counts, int64 [R, K].
    """
    edges = np.rint(np.cumsum(shares, axis=1) * total).astype(np.int64)
    edges[:, -1:] = total
    return np.diff(edges, axis=1, prepend=0)


def split_evenly(total: int, parts: int) -> list[int]:
    """Split a total into whole numbers that differ by at most one.

    Args:
        total: number to split.
        parts: number of parts.
    """
    return [total // parts + (i < total % parts) for i in range(parts)]


def merge_groups(members: list[np.ndarray], clients: int) -> list[np.ndarray]:
    """Assign whole groups to clients: each group, the largest first, to the client with the fewest samples.

    Args:
        members: indices of the samples of each group.
        clients: number of clients, less than the number of groups.

    Returns:
        Indices of the samples of each client.
    """
    heap = [(0, client) for client in range(clients)]
    assigned: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for group in sorted(members, key=len, reverse=True):
        size, client = heapq.heappop(heap)
        assigned[client].append(group)
        heapq.heappush(heap, (size + len(group), client))
    return [np.concatenate(part) for part in assigned]


def divide_groups(members: list[np.ndarray], clients: int) -> list[np.ndarray]:
    """Divide groups among clients: each further client goes to the group with the most samples per client.

    Args:
        members: indices of the samples of each group.
        clients: number of clients, larger than the number of groups.

    Returns:
        Indices of the samples of each client; the clients of one group get equal shares of it.
    """
    heap = [(-len(group), g, 1) for g, group in enumerate(members)]
    heapq.heapify(heap)
    for _ in range(clients - len(members)):
        _, g, count = heapq.heappop(heap)
        heapq.heappush(heap, (-len(members[g]) / (count + 1), g, count + 1))
    counts = {g: count for _, g, count in heap}
    return [part for g, group in enumerate(members) for part in np.array_split(group, counts[g])]
