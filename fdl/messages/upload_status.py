"""Where a client stands, as a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fdl.errors import RejectedMessageError
from fdl.messages.base import Message, Meta
from fdl.messages.serialization import pop_meta, reject_leftovers


@dataclass(frozen=True, eq=False)
class UploadStatus(Message):
    """Which answers of a client are in force, in a few bytes: no others are sent while these still hold.

    From the server it says of which round it holds answers; from a client, that these still are what it would say.

    Attributes:
        round: the round in which the answers were sent, 0 for none.
        wanted: from the server, whether it wants others at all; from a client always true.
    """

    kind: ClassVar[str] = "standing"
    code: ClassVar[int] = 5

    round: int
    wanted: bool = True

    def fields(self) -> dict[str, np.ndarray]:
        """No arrays."""
        return {}

    def meta(self) -> Meta:
        """Both numbers."""
        return {"round": int(self.round), "wanted": int(self.wanted)}

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> UploadStatus:
        """Inverse of `meta`."""
        meta = dict(meta)
        round, wanted = pop_meta(meta, "round", int), pop_meta(meta, "wanted", int)
        reject_leftovers(meta)
        reject_leftovers(fields)
        if wanted not in (0, 1):
            raise RejectedMessageError(f"'wanted' must be 0 or 1, got {wanted}")
        return cls(round, bool(wanted))

    def validate(self) -> None:
        """No negative round."""
        if self.round < 0:
            raise RejectedMessageError(f"round is negative: {self.round}")
