"""Features and labels of private samples as a message, under a kind that the ledger shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.messages import Message, Meta, check_finite, reject_leftovers, smallest_int_dtype, take_integers, to_torch


@dataclass(frozen=True, eq=False)
class PrivateFeatures(Message):
    """One row per *private* sample of the sender.

    Attributes:
        features: float [n, d].
        logits: float [n, C], the sender's own.
        labels: int64 [n].
    """

    kind: ClassVar[str] = "private_features"
    code: ClassVar[int] = 7

    features: Tensor
    logits: Tensor
    labels: Tensor

    def fields(self) -> dict[str, np.ndarray]:
        """Return both matrices; labels in the narrowest integers that hold them."""
        both = {"features": self.features.numpy(force=True), "logits": self.logits.numpy(force=True)}
        return both | {"labels": smallest_int_dtype("labels", self.labels)}

    def meta(self) -> Meta:
        """Return no numbers."""
        return {}

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> PrivateFeatures:
        """Build the message from `fields`."""
        fields = dict(fields)
        if not {"features", "logits"} <= fields.keys():
            raise RejectedMessageError("private features without features or logits")
        features, logits = (to_torch(fields.pop(name)) for name in ("features", "logits"))
        labels = take_integers(fields, "labels", logits.numel())
        if labels is None:
            raise RejectedMessageError("private features without labels")
        reject_leftovers(meta)
        reject_leftovers(fields)
        return cls(features, logits, labels)

    def validate(self) -> None:
        """Check for finite matrices and labels from 0, of one length."""
        for name, values in (("features", self.features), ("logits", self.logits)):
            if values.ndim != 2 or not values.is_floating_point() or values.shape[1] < 1:
                raise RejectedMessageError(
                    f"{name} must be a matrix of real numbers, got {values.dtype} {list(values.shape)}"
                )
            if len(values) != len(self.labels):
                raise RejectedMessageError(f"{len(values)} {name} with {len(self.labels)} labels")
            check_finite(name, values)
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise RejectedMessageError(f"labels must be a vector of whole numbers, got {list(self.labels.shape)}")
        if self.labels.numel() and self.labels.min() < 0:
            raise RejectedMessageError("a label is negative")
