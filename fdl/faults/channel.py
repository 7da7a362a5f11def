"""Channel on which uploads are late, truncated or full of NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fdl.comm.channel import Channel
from fdl.faults.base import Schedule
from fdl.messages import Bundle, Message
from fdl.state.float_formats import is_float_dtype, narrow


class FaultyChannel(Channel):
    """Channel whose clients fail according to a schedule.

    Args:
        schedule: the faults per client and round.
        channel: the arguments of `Channel`.
    """

    def __init__(self, *, schedule: Schedule, **channel: Any):
        super().__init__(**channel)
        self._schedule = schedule

    def reach(self, asked: Sequence[int], dropped: Sequence[int], round: int) -> tuple[list[int], list[int]]:
        """Return the sampled clients that can be reached, and those among them that upload nothing.

        Args:
            asked: ids of the sampled clients.
            dropped: ids among them that upload nothing, faults aside.
            round: the round, from 1.
        """
        return self._schedule.cohort(asked, dropped, round)

    def upload(self, message: Message | Bundle | None, client: int, round: int) -> Message | Bundle | None:
        """Upload as `Channel.upload` does, from a client that may be slow and may send NaN.

        Args:
            message: the client's message, None for nothing to send.
            client: the client's id.
            round: the round, from 1.

        Returns:
            The message that the server receives.

        Raises:
            RejectedMessageError: the upload is not accepted.
        """
        fault = self._schedule.fault_of(round, client)
        if fault.seconds:
            self.busy(client, round, fault.seconds)
        return super().upload(message if fault.finite else without_numbers(message), client, round)

    def transmit(self, data: bytes, client: int, round: int, direction: str) -> bytes:
        """Return all bytes, or the first part of an upload that is truncated.

        Args:
            data: the encoded message.
            client: the client's id.
            round: the round, from 1.
            direction: ``"up"`` or ``"down"``; only uploads are truncated.
        """
        arrives = self._schedule.fault_of(round, client).arrives if direction == "up" else 1.0
        return data if arrives == 1 else data[: int(arrives * len(data))]


def without_numbers(message: Message | Bundle | None) -> Message | Bundle | None:
    """Return a message with every real number of its arrays replaced by NaN; integers stay."""
    if isinstance(message, Bundle):
        return Bundle(tuple(_without_numbers(part) for part in message.parts))
    return None if message is None else _without_numbers(message)


def _without_numbers(message: Message) -> Message:
    fields = {
        name: narrow(np.full(array.shape, np.nan, np.float32), array.dtype)
        if is_float_dtype(array.dtype)
        else array.copy()
        for name, array in message.fields().items()
    }
    return message.build(fields, message.meta())
