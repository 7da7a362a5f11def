"""Base class and wire codes of messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fdl.errors import RejectedMessageError

Meta = dict[str, Any]
"""Numbers (int, float) and short strings of a message; each message checks those that it reads."""

OWN_CODES = range(1, 128)
"""Wire codes of the message types of fdl itself."""

EXTENSION_CODES = range(128, 256)
"""Wire codes for message types that other packages define; fdl will never use one of them."""

_TYPES: dict[int, type[Message]] = {}


class Message(ABC):
    """Message from one participant to another in one round.

    A message type is a frozen dataclass with `eq=False` (comparing tensors has no single truth value). Most extensions
    need none of their own: `TensorMessage` carries named groups of tensors under a name that is chosen per message.

    Attributes:
        kind: name in the ledger of bytes; no two types share one.
        code: number on the wire, one byte, literal: 1 to 127 in fdl itself (`OWN_CODES`), 128 to 255 in any other
            package (`EXTENSION_CODES`).
    """

    kind: ClassVar[str]
    code: ClassVar[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the type under its code.

        Raises:
            TypeError: the class has no kind or code, the code is outside its range, or another type has the same.
        """
        super().__init_subclass__(**kwargs)
        _register(cls)

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


def kind_owner(kind: str) -> type[Message] | None:
    """Return the message type that has a kind, None where none has."""
    return next((cls for cls in _TYPES.values() if cls.kind == kind), None)


def _register(cls: type[Message]) -> None:
    """Register a message type; it replaces the same class from an earlier run of its cell or module."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    kind, code = (getattr(cls, attribute, None) for attribute in ("kind", "code"))
    if not isinstance(kind, str) or not isinstance(code, int):
        raise TypeError(
            f"message type {name} needs a literal `kind` (a string) and `code` (a number), got {kind!r}, {code!r}"
        )
    own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    codes = OWN_CODES if own else EXTENSION_CODES
    others = {n: other for n, other in _TYPES.items() if f"{other.__module__}.{other.__qualname__}" != name}
    free = next((n for n in codes if n not in others), None)
    if code in others:
        other = others[code]
        raise TypeError(
            f"message types {name} and {other.__module__}.{other.__qualname__} have the same wire code {code}; "
            f"{free} is free"
        )
    if code not in codes:
        raise TypeError(
            f"message type {name} has wire code {code}; codes {codes[0]} to {codes[-1]} are for "
            f"{'fdl itself' if own else 'packages other than fdl'}, {free} is free"
        )
    if same := [other for other in others.values() if other.kind == kind]:
        raise TypeError(
            f"message types {name} and {same[0].__module__}.{same[0].__qualname__} have the same kind {kind!r}"
        )
    for n in [n for n in _TYPES if n not in others]:
        del _TYPES[n]
    _TYPES[code] = cls


def message_type(code: int) -> type[Message]:
    """Return the class of a wire code, or raise RefusedError."""
    try:
        return _TYPES[code]
    except KeyError:
        raise RejectedMessageError(f"unknown message type {code}") from None
