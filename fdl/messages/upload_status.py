"""Upload status of a client: the round of its last accepted upload, and a request for a new one."""

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
    """Reference to a client's last uploaded predictions, in a few bytes, instead of predictions that did not change.

    From the server it gives the round of the predictions that the server holds; from a client it confirms that these
    are still up to date. The kind and the key on the wire, ``standing`` and ``wanted``, count in the recorded bytes.

    Attributes:
        round: the round in which the predictions were uploaded, 0 for none.
        requests_upload: from the server, whether it accepts new predictions at all; from a client always true.
    """

    kind: ClassVar[str] = "standing"
    code: ClassVar[int] = 5

    round: int
    requests_upload: bool = True

    def fields(self) -> dict[str, np.ndarray]:
        """Return no arrays."""
        return {}

    def meta(self) -> Meta:
        """Return the round and the request."""
        return {"round": int(self.round), "wanted": int(self.requests_upload)}

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> UploadStatus:
        """Build the message from `meta`."""
        meta = dict(meta)
        round, requested = pop_meta(meta, "round", int), pop_meta(meta, "wanted", int)
        reject_leftovers(meta)
        reject_leftovers(fields)
        if requested not in (0, 1):
            raise RejectedMessageError(f"'wanted' must be 0 or 1, got {requested}")
        return cls(round, bool(requested))

    def validate(self) -> None:
        """Check that the round is not negative."""
        if self.round < 0:
            raise RejectedMessageError(f"round is negative: {self.round}")
