"""Inner activations as a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.messages.base import Message, Meta
from fdl.messages.confidences import (
    QuantizedLogWeights,
    check_confidence,
    codes_of,
    confidence_meta,
    select_rows,
    take_confidence,
)
from fdl.messages.serialization import (
    check_finite,
    reject_leftovers,
    smallest_int_dtype,
    take_integers,
    to_numpy,
    to_torch,
)


@dataclass(frozen=True, eq=False)
class Features(Message):
    """Activations of named layers for rows of the proxy set, pooled to one vector per row.

    Attributes:
        layers: by name of the layer, float [n, d]; every layer may have its own d.
        rows: int64 [n], the rows of the proxy set, or None for the whole set in order.
        confidence: the sender's log-weight of every row, or None; then that of the responses it is sent with counts.
    """

    kind: ClassVar[str] = "features"
    code: ClassVar[int] = 3

    layers: Mapping[str, Tensor]
    rows: Tensor | None = None
    confidence: QuantizedLogWeights | None = None

    def fields(self) -> dict[str, np.ndarray]:
        """Return one array per layer; rows in the narrowest integers that hold them; the confidence's codes."""
        fields = {f"layer/{name}": to_numpy(name, values) for name, values in self.layers.items()}
        if self.rows is not None:
            fields["rows"] = smallest_int_dtype("rows", self.rows)
        return fields | codes_of(self.confidence)

    def meta(self) -> Meta:
        """Return the confidence's scale."""
        return confidence_meta(self.confidence)

    def select_rows(self, keep: Tensor) -> Features:
        """Return the message with the rows at positions `keep` only (int64)."""
        layers = {name: values[keep] for name, values in self.layers.items()}
        rows = keep if self.rows is None else self.rows[keep]
        return Features(layers, rows, select_rows(self.confidence, keep))

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Features:
        """Build the message from `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        names = [name for name in fields if name.startswith("layer/")]
        layers = {name.removeprefix("layer/"): to_torch(fields.pop(name)) for name in names}
        most = max((len(values) if values.ndim else 0 for values in layers.values()), default=0)
        rows = take_integers(fields, "rows", most)
        confidence = take_confidence(fields, meta)
        reject_leftovers(meta)
        reject_leftovers(fields)
        return cls(layers, rows, confidence)

    def validate(self) -> None:
        """Check for at least one layer, finite matrices, and rows and confidence of one length."""
        if not self.layers:
            raise RejectedMessageError("features without a layer")
        first = next(iter(self.layers.values()))
        count = len(first) if first.ndim else 0
        for name, values in self.layers.items():
            if values.ndim != 2 or not values.is_floating_point() or values.shape[1] < 1:
                raise RejectedMessageError(
                    f"features of {name!r:.80} must be a matrix of real numbers, got {values.dtype} "
                    f"{list(values.shape)}"
                )
            if len(values) != count:
                raise RejectedMessageError(f"layer {name!r:.80} has {len(values)} rows, another has {count}")
            check_finite(f"layer {name!r:.80}", values)
        if self.rows is not None:
            if self.rows.dtype != torch.int64 or self.rows.shape != (count,):
                raise RejectedMessageError(f"{count} features need as many int64 rows, got {list(self.rows.shape)}")
            if self.rows.numel() and self.rows.min() < 0:
                raise RejectedMessageError("a proxy row is negative")
        check_confidence(self.confidence, count, "features")
