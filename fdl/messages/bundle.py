"""Several messages that go together."""

from __future__ import annotations

from dataclasses import dataclass

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
        """Parts are found by their type, so there is one of each."""
        if len({type(part) for part in self.parts}) < len(self.parts):
            raise ValueError(f"a bundle of several {', '.join(part.kind for part in self.parts)}")

    def truncated(self, share: float) -> Bundle | None:
        """As `Message.truncated`: features stay those of the answers that are kept; other parts stay as they are."""
        parts = parts_of(self)
        keep = parts[Responses].most_confident_rows(share) if Responses in parts else ()
        if len(keep) == 0:
            return None
        rows = {type: parts[type].select_rows(keep) for type in (Responses, Features) if type in parts}
        return Bundle(tuple((parts | rows).values()))


def parts_of(message: Message | Bundle | None) -> dict[type[Message], Message]:
    """The parts of a bundle, or a single message, by type; nothing for None."""
    if message is None:
        return {}
    return {type(part): part for part in (message.parts if isinstance(message, Bundle) else (message,))}
