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

    Example:
        >>> stream_seed(0, "partition") == stream_seed(0, "partition")
        True
        >>> stream_seed(0, "fit", round=1, client=3) == stream_seed(0, "fit", round=2, client=3)
        False
    """
    key = f"{seed}/{purpose}/{round}/{client}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def numpy_stream(seed: int, purpose: str, round: int = 0, client: int = -1) -> np.random.Generator:
    """Create the numpy generator of one stream, seeded by `stream_seed` with the same arguments.

    Example:
        >>> first, again = numpy_stream(0, "cohort", round=1), numpy_stream(0, "cohort", round=1)
        >>> first.random() == again.random()
        True
    """
    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, round, client)))


def torch_stream(seed: int, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
    """Create the CPU torch generator of one stream, seeded by `stream_seed` with the same arguments.

    Example:
        >>> torch_stream(0, "fit", client=2).initial_seed() == stream_seed(0, "fit", client=2)
        True
    """
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, purpose, round, client))


class GlobalStreams:
    """A state of torch's global streams, of the CPU and of the current GPU.

    Args:
        states: of the CPU's generator and, where CUDA is in use, of the GPU's.
    """

    def __init__(self, states: tuple[torch.Tensor, ...]):
        self._states = states

    @classmethod
    def current(cls) -> GlobalStreams:
        """Take down the state that they are in."""
        import torch

        cuda = (torch.cuda.get_rng_state(),) if torch.cuda.is_initialized() else ()
        return cls((torch.default_generator.get_state(), *cuda))

    def restore(self) -> None:
        """Bring them back to this state."""
        import torch

        torch.default_generator.set_state(self._states[0])
        if len(self._states) > 1:
            torch.cuda.set_rng_state(self._states[1])
