"""Codec state of a link, kept from one accepted message to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fdl.comm.stages.base import CodecContext, CodecState
from fdl.state.float_formats import BFLOAT16


class LinkState:
    """State of a chain's stages for one client's messages in one direction.

    Both ends reach the same memory, because what is kept depends on the bytes alone and is kept only once the receiver
    has accepted the message, which the sender learns from it. So a simulation holds it once for both ends. What only
    the sender knows, such as the error that it still has to make good, lies in it too.

    What an honest sender leaves is about as large as his messages; of one that sends other arrays every round all but
    the last are forgotten, at both ends, once they are larger than the limit.

    `turn` hands a stage its part, `begin` forgets what a message that went wrong would have left, and `commit` keeps
    what an accepted one leaves.

    Args:
        limit: bytes beyond which arrays that the last message did not have are forgotten.
    """

    def __init__(self, limit: int = 1 << 31):
        self._limit = limit
        self._kept: dict[str, CodecState] = {}
        self._drafts: dict[str, dict[str, np.ndarray | int]] = {}

    def turn(self, array: str, stage: str, about: CodecContext) -> CodecContext:
        """Return a stage's turn with one array: `about`, and what the stage remembers of it."""
        key = f"{stage}/{array}"
        return CodecContext(about.rng, about.round, about.rows, self._kept.get(key), self._drafts.setdefault(key, {}))

    def begin(self) -> None:
        """A message is about to be encoded, or to be decoded by another end than the one that encoded it."""
        self._drafts = {}

    def commit(self) -> None:
        """The message was accepted."""
        # in the order in memory that a checkpoint gives back, too
        new = {key: {n: _plain(v) for n, v in draft.items()} for key, draft in self._drafts.items() if draft}
        self._kept.update(new)
        self._drafts = {}
        arrays = [value for kept in self._kept.values() for value in kept.values() if isinstance(value, np.ndarray)]
        if sum(array.nbytes for array in arrays) > self._limit:
            self._kept = new

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and strings that a checkpoint can hold."""
        return {key: {name: _freeze(value) for name, value in kept.items()} for key, kept in self._kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the memory that gave this state."""
        self._drafts = {}
        self._kept = {key: {name: _thaw(value) for name, value in kept.items()} for key, kept in state.items()}


def _plain(value: np.ndarray | int) -> np.ndarray | int:
    """An array row by row in memory, copied only where it is not."""
    return value if isinstance(value, int) else np.asarray(value, order="C")


def _freeze(value: np.ndarray | int) -> Any:
    """An array as its bytes, since numpy has dtypes that torch and safetensors have not."""
    if isinstance(value, int):
        return value
    dtype = "bfloat16" if value.dtype == BFLOAT16 else value.dtype.str
    data = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.nbytes else torch.empty(0)
    return {"dtype": dtype, "shape": list(value.shape), "data": data}


def _thaw(value: Any) -> np.ndarray | int:
    if isinstance(value, int):
        return value
    dtype = BFLOAT16 if value["dtype"] == "bfloat16" else np.dtype(value["dtype"])
    return np.frombuffer(value["data"].numpy().tobytes(), dtype).reshape(value["shape"])
