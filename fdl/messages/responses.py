"""Predictions for proxy samples as a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.messages.base import Message, Meta
from fdl.messages.confidences import QuantizedLogWeights, select_rows
from fdl.messages.serialization import (
    check_finite,
    check_sample_count,
    pop_meta,
    reject_leftovers,
    samples_told,
    take_samples,
    to_numpy,
    to_torch,
)

Form = Literal["logits", "probabilities", "embeddings"]

_FORMS = get_args(Form)  # the order is the wire format: new forms go to the end


@dataclass(frozen=True, eq=False)
class Responses(Message):
    """Predictions of a model for rows of the proxy set.

    Attributes:
        values: float [n, C], logits, probabilities or embeddings.
        form: ``"logits"``, ``"probabilities"`` or ``"embeddings"``.
        rows: int64 [n], the rows of the proxy set, or None for the whole set in order.
        confidence: the sender's log-weight of every row, or None.
        samples: number of examples that the sender trained on; 0, which is not sent, if it does not report it.

    Example:
        >>> import torch
        >>> message = Responses(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "probabilities")
        >>> message.validate()
        >>> sorted(message.fields()), message.meta()
        (['values'], {'form': 1})
    """

    kind: ClassVar[str] = "responses"
    code: ClassVar[int] = 2

    values: Tensor
    form: Form
    rows: Tensor | None = None
    confidence: QuantizedLogWeights | None = None
    samples: int = 0

    def fields(self) -> dict[str, np.ndarray]:
        """Return the values; rows in the narrowest unsigned integers that hold them; the confidence's codes."""
        fields = {"values": to_numpy("values", self.values)}
        if self.rows is not None:
            rows = to_numpy("rows", self.rows)
            if rows.size and rows.min() >= 0:
                rows = rows.astype(np.min_scalar_type(rows.max()))
            fields["rows"] = rows
        if self.confidence is not None:
            fields["codes"] = to_numpy("codes", self.confidence.codes)
        return fields

    def meta(self) -> Meta:
        """Return the form's number, the sample count if reported, and the confidence's scale."""
        meta: Meta = {"form": _FORMS.index(self.form)} | samples_told(self.samples)
        if self.confidence is not None:
            meta |= {"lo": float(self.confidence.lo), "step": float(self.confidence.step)}
        return meta

    def truncated(self, share: float) -> Responses | None:
        """Return the rows with the highest confidence, or the highest top probability without one, in their order."""
        keep = self.most_confident_rows(share)
        return self.select_rows(keep) if len(keep) else None

    def most_confident_rows(self, share: float) -> Tensor:
        """Return the ascending positions of the most confident share of rows; of embeddings, evenly spread ones."""
        total = len(self.values)
        count = int(share * total)
        if self.confidence is not None:
            certainty = self.confidence.codes.float()
        elif self.form == "embeddings":
            return torch.arange(count) * total // max(count, 1)
        else:
            values = self.values.detach().float()
            certainty = (values if self.form == "probabilities" else torch.softmax(values, dim=1)).amax(dim=1)
        return certainty.cpu().argsort(descending=True, stable=True)[:count].sort().values

    def select_rows(self, keep: Tensor) -> Responses:
        """Return the message with the rows at positions `keep` only (int64)."""
        rows = keep if self.rows is None else self.rows[keep]
        return replace(self, values=self.values[keep], rows=rows, confidence=select_rows(self.confidence, keep))

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Responses:
        """Build the message from `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        form, samples = pop_meta(meta, "form", int), take_samples(meta)
        if not 0 <= form < len(_FORMS) or "values" not in fields:
            raise RejectedMessageError("responses without values or of an unknown form")
        values, found, codes = fields.pop("values"), fields.pop("rows", None), fields.pop("codes", None)
        rows = None
        if found is not None:
            # The length is checked before the rows are widened: eight bytes per row are then no more than the values.
            if found.dtype.kind not in "iu" or found.size > values.size:
                raise RejectedMessageError(f"{values.size} values with {found.size} rows of {found.dtype}")
            rows = torch.from_numpy(found.astype(np.int64))
        confidence = None
        if codes is not None:
            confidence = QuantizedLogWeights(
                to_torch(codes), pop_meta(meta, "lo", float), pop_meta(meta, "step", float)
            )
        reject_leftovers(meta)
        reject_leftovers(fields)
        return cls(to_torch(values), _FORMS[form], rows, confidence, samples)

    def validate(self) -> None:
        """Check for a finite matrix, no negative probability, and rows and confidence of the same length."""
        check_sample_count(self.samples)
        values, rows, confidence = self.values, self.rows, self.confidence
        if self.form not in _FORMS:
            raise RejectedMessageError(f"unknown form {self.form!r}")
        if values.ndim != 2 or not values.is_floating_point():
            raise RejectedMessageError(
                f"responses must be a matrix of real numbers, got {values.dtype} {list(values.shape)}"
            )
        if values.shape[1] < 1:
            raise RejectedMessageError("responses have no columns")
        check_finite("responses", values)
        if self.form == "probabilities" and values.numel() and values.min() < 0:
            raise RejectedMessageError("a probability is negative")
        if rows is not None:
            if rows.dtype != torch.int64 or rows.shape != values.shape[:1]:
                raise RejectedMessageError(f"{len(values)} responses need as many int64 rows, got {list(rows.shape)}")
            if rows.numel() and rows.min() < 0:
                raise RejectedMessageError("a proxy row is negative")
        if confidence is not None:
            confidence.validate()
            if len(confidence.codes) != len(values):
                raise RejectedMessageError(f"{len(values)} responses with {len(confidence.codes)} confidences")
