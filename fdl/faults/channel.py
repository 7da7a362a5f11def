"""A link on which uploads are late, break off or hold no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fdl.comm.channel import Channel
from fdl.faults.base import Schedule
from fdl.messages import Bundle, Message
from fdl.state.float_formats import is_float_dtype, narrow


class FaultyChannel(Channel):
    """A channel whose clients suffer what a schedule says.

    Args:
        schedule: what befalls whom.
        channel: the arguments of `Channel`.
    """

    def __init__(self, *, schedule: Schedule, **channel: Any):
        super().__init__(**channel)
        self._schedule = schedule

    def reach(self, asked: Sequence[int], dropped: Sequence[int], round: int) -> tuple[list[int], list[int]]:
        """Return who of those asked is there, and who of them is not heard."""
        return self._schedule.cohort(asked, dropped, round)

    def upload(self, message: Message | Bundle | None, client: int, round: int) -> Message | Bundle | None:
        """As `Channel.upload`, from a client that may have taken long, and may send nonsense."""
        fate = self._schedule.fate(round, client)
        if fate.seconds:
            self.busy(client, round, fate.seconds)
        return super().upload(message if fate.finite else without_numbers(message), client, round)

    def transmit(self, data: bytes, client: int, round: int, direction: str) -> bytes:
        """Carry all bytes, or the first of an upload that breaks off."""
        arrives = self._schedule.fate(round, client).arrives if direction == "up" else 1.0
        return data if arrives == 1 else data[: int(arrives * len(data))]


def without_numbers(message: Message | Bundle | None) -> Message | Bundle | None:
    """Return a message with NaN in the place of every real number in its arrays; integers stay."""
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
