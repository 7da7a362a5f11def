"""Several messages that go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fdl.errors import UserError
from fdl.messages.base import Message
from fdl.messages.features import Features
from fdl.messages.responses import Responses


@dataclass(frozen=True, eq=False)
class Bundle:
    """Several messages that go together; each is packed and counted by itself, under its own kind.

    Attributes:
        parts: at most one of each type.
    """

    parts: tuple[Message, ...]

    def __post_init__(self) -> None:
        """Check that no type occurs twice, since parts are found by their type."""
        if len({type(part) for part in self.parts}) < len(self.parts):
            raise ValueError(f"a bundle of several {', '.join(part.kind for part in self.parts)}")

    def truncated(self, share: float) -> Bundle | None:
        """Truncate as `Message.truncated` does: features keep the predictions' rows; other parts stay."""
        parts = parts_of(self)
        responses, features = parts.get(Responses), parts.get(Features)
        if not isinstance(responses, Responses):
            return None
        keep = responses.most_confident_rows(share)
        if len(keep) == 0:
            return None
        rows: dict[type[Message], Message] = {Responses: responses.select_rows(keep)}
        if isinstance(features, Features):
            rows[Features] = features.select_rows(keep)
        return Bundle(tuple((parts | rows).values()))


def parts_of(message: Message | Bundle | None) -> dict[type[Message], Message]:
    """Return the parts of a bundle, or a single message, by type; nothing for None."""
    if message is None:
        return {}
    return {type(part): part for part in (message.parts if isinstance(message, Bundle) else (message,))}


def require_message(value: Any, source: str) -> None:
    """Raise where a method's function returned something that cannot be sent.

    Args:
        value: what it returned; None, for nothing to send, is fine.
        source: names method, function and client, for the error.

    Raises:
        UserError: the value is neither a message nor a bundle of some.
    """
    if value is not None and not isinstance(value, Message | Bundle):
        raise UserError(
            f"{source} returned a {type(value).__name__}, which is not a Message; return Parameters, Responses, "
            "TensorMessage for any other tensors, a Bundle of several, or None for nothing"
        )
