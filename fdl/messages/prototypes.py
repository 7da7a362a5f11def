"""Means of classes as a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.messages.base import Message, Meta
from fdl.messages.confidences import QuantizedLogWeights, check_confidence, codes_of, confidence_meta, take_confidence
from fdl.messages.serialization import (
    check_finite,
    reject_leftovers,
    smallest_int_dtype,
    take_integers,
    to_numpy,
    to_torch,
)


@dataclass(frozen=True, eq=False)
class Prototypes(Message):
    """Centroids of a sender's own data, a few for each class or concept.

    Attributes:
        values: float [m, d].
        labels: int64 [m], the class of each; -1 throughout for data without classes.
        counts: int64 [m], number of samples that each represents, at least 1.
        confidence: the sender's log-weight of every prototype, or None.
    """

    kind: ClassVar[str] = "prototypes"
    code: ClassVar[int] = 4

    values: Tensor
    labels: Tensor
    counts: Tensor
    confidence: QuantizedLogWeights | None = None

    def fields(self) -> dict[str, np.ndarray]:
        """Return the values; labels and counts in the narrowest integers that hold them; the confidence's codes."""
        fields = {"values": to_numpy("values", self.values)}
        fields |= {
            "labels": smallest_int_dtype("labels", self.labels),
            "counts": smallest_int_dtype("counts", self.counts),
        }
        return fields | codes_of(self.confidence)

    def meta(self) -> Meta:
        """Return the confidence's scale."""
        return confidence_meta(self.confidence)

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Prototypes:
        """Build the message from `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        if "values" not in fields:
            raise RejectedMessageError("prototypes without values")
        values = to_torch(fields.pop("values"))
        labels, counts = (take_integers(fields, name, values.numel()) for name in ("labels", "counts"))
        if labels is None or counts is None:
            raise RejectedMessageError("prototypes without labels or counts")
        confidence = take_confidence(fields, meta)
        reject_leftovers(meta)
        reject_leftovers(fields)
        return cls(values, labels, counts, confidence)

    def validate(self) -> None:
        """Check for a finite matrix, labels from -1, counts from 1, and confidence of the same length."""
        values = self.values
        if values.ndim != 2 or not values.is_floating_point() or values.shape[1] < 1:
            raise RejectedMessageError(
                f"prototypes must be a matrix of real numbers, got {values.dtype} {list(values.shape)}"
            )
        check_finite("prototypes", values)
        for name, numbers, least in (("labels", self.labels, -1), ("counts", self.counts, 1)):
            if numbers.dtype != torch.int64 or numbers.shape != values.shape[:1]:
                raise RejectedMessageError(
                    f"{len(values)} prototypes need as many int64 {name}, got {list(numbers.shape)}"
                )
            if numbers.numel() and numbers.min() < least:
                raise RejectedMessageError(f"{name} of prototypes must be at least {least}, got {int(numbers.min())}")
        check_confidence(self.confidence, len(values), "prototypes")
