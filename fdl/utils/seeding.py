"""Independent random streams, each derived from its purpose, round and client.

Results therefore do not depend on the order of execution, on the number of processes, or on whether a run was resumed:
the stream of client 3 in round 7 is the same wherever and whenever it is drawn.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int | str, purpose: str, round: int = 0, client: int = -1) -> int:
    """Derive the 63-bit seed of one stream.

    Args:
        seed: the recipe's seed, or a secret.
        purpose: the stream's purpose, e.g. ``"partition"``, ``"cohort"``, ``"fit"``.
        round: the round, 0 before the first.
        client: the client's id, -1 for the server.

    Returns:
        An integer in [0, 2**63), accepted by numpy and torch alike.
    """
    key = f"{seed}/{purpose}/{round}/{client}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def numpy_stream(seed: int, purpose: str, round: int = 0, client: int = -1) -> np.random.Generator:
    """Create the numpy generator of one stream, seeded by `stream_seed` with the same arguments."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, round, client)))


def torch_stream(seed: int, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
    """Create the CPU torch generator of one stream, seeded by `stream_seed` with the same arguments."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, purpose, round, client))
