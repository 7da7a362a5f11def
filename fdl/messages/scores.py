"""Confidence of a client on the proxy set, as a message next to its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fdl.errors import RejectedMessageError
from fdl.messages.base import Message, Meta
from fdl.messages.confidences import QuantizedLogWeights, codes_of, confidence_meta, take_confidence
from fdl.messages.serialization import reject_leftovers


@dataclass(frozen=True, eq=False)
class Scores(Message):
    """One log-weight per row of the proxy set, in order, of a client that also uploads its weights.

    Attributes:
        confidence: the log-weights, in 8 bits each.
    """

    kind: ClassVar[str] = "scores"
    code: ClassVar[int] = 8

    confidence: QuantizedLogWeights

    def fields(self) -> dict[str, np.ndarray]:
        """Return the codes."""
        return codes_of(self.confidence)

    def meta(self) -> Meta:
        """Return the codes' scale."""
        return confidence_meta(self.confidence)

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Scores:
        """Build the message from `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        confidence = take_confidence(fields, meta)
        if confidence is None:
            raise RejectedMessageError("scores without codes")
        reject_leftovers(meta)
        reject_leftovers(fields)
        return cls(confidence)

    def validate(self) -> None:
        """Check for a vector of 8-bit numbers on a finite scale."""
        self.confidence.validate()
