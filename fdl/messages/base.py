"""What all messages have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fdl.errors import RejectedMessageError

Meta = dict[str, int | float | str]
"""Numbers and short strings of a message."""

_TYPES: dict[int, type[Message]] = {}


class Message(ABC):
    """What one participant sends to another in one round.

    A message type is a frozen dataclass with `eq=False` (comparing tensors has no single truth value) and literal
    `kind`, its name in the ledger, and `code`, its number on the wire.
    """

    kind: ClassVar[str]
    code: ClassVar[int]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        other = _TYPES.setdefault(cls.code, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__name__} and {other.__name__} have the same wire code {cls.code}")

    @abstractmethod
    def fields(self) -> Mapping[str, np.ndarray]:
        """Return the arrays to send; they may share memory with the message."""

    @abstractmethod
    def meta(self) -> Meta:
        """Return the numbers and short strings to send."""

    def truncated(self, share: float) -> Message | None:
        """Return the message with about this share of its content, the most useful part, for a link of few bytes.

        Args:
            share: in (0, 1).

        Returns:
            None where nothing can be left out, or nothing would be left.
        """
        return None

    @classmethod
    @abstractmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Message:
        """Return the message that gave these fields and numbers; the arrays' memory is taken over.

        Raises:
            RefusedError: something is missing, superfluous or of a wrong type.
        """

    @abstractmethod
    def validate(self) -> None:
        """Check ranks, lengths and values.

        Raises:
            RefusedError: with the reason; the sender is the caller's to name.
        """


def message_type(code: int) -> type[Message]:
    """Return the class of a wire code, or raise RefusedError."""
    try:
        return _TYPES[code]
    except KeyError:
        raise RejectedMessageError(f"unknown message type {code}") from None
