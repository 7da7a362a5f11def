"""Confidence of a sender in each of its predictions, as quantised log-weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.messages.base import Meta
from fdl.messages.serialization import pop_meta, to_numpy, to_torch


@dataclass(frozen=True, eq=False)
class QuantizedLogWeights:
    """One log-weight per proxy row, in 8 bits: value = lo + step · code.

    The weights of several clients for a row are the softmax over clients of their log-weights.

    Attributes:
        codes: uint8 [n].
        lo: value of code 0, a float32.
        step: distance of two codes, a float32, at least 0.
    """

    codes: Tensor
    lo: float
    step: float

    @classmethod
    def quantize(cls, log_weights: Tensor) -> QuantizedLogWeights:
        """Round log-weights [n] to 256 levels between the least and the largest; the error is at most step/2.

        What is not finite is not hidden: the scale becomes NaN, and the receiver refuses the message.
        """
        x = log_weights.detach().to("cpu", torch.float64)
        low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0)
        if not max(abs(low), abs(high)) < 1e38:
            return cls(torch.zeros(x.shape, dtype=torch.uint8), math.nan, math.nan)
        # Both ends go outwards in float32, so that no value lies beyond the codes.
        lo = np.float32(low)
        if lo > low:
            lo = np.nextafter(lo, np.float32(-np.inf))
        step = np.float32((high - float(lo)) / 255)
        if 255 * float(step) < high - float(lo):
            step = np.nextafter(step, np.float32(np.inf))
        codes = torch.round((x - float(lo)) / float(step)) if step > 0 else torch.zeros_like(x)
        return cls(codes.to(torch.uint8), float(lo), float(step))

    def values(self) -> Tensor:
        """Return the log-weights as float32 [n]."""
        return self.codes.to(torch.float32) * self.step + self.lo

    def validate(self) -> None:
        """Check dtype, rank and scale."""
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 1:
            raise RejectedMessageError("confidence codes must be a vector of 8-bit numbers")
        if not (math.isfinite(self.lo) and math.isfinite(self.step) and self.step >= 0):
            raise RejectedMessageError(f"confidence scale is not usable: lo {self.lo}, step {self.step}")


def select_rows(confidence: QuantizedLogWeights | None, keep: Tensor) -> QuantizedLogWeights | None:
    """Return the confidences of the rows at positions `keep`, int64; None for none."""
    return None if confidence is None else replace(confidence, codes=confidence.codes[keep])


def codes_of(confidence: QuantizedLogWeights | None) -> dict[str, np.ndarray]:
    """Return the array to send; empty without confidences."""
    return {} if confidence is None else {"codes": to_numpy("codes", confidence.codes)}


def confidence_meta(confidence: QuantizedLogWeights | None) -> Meta:
    """Return the scale to send with the codes; empty without confidences."""
    return {} if confidence is None else {"lo": float(confidence.lo), "step": float(confidence.step)}


def take_confidence(fields: dict[str, np.ndarray], meta: Meta) -> QuantizedLogWeights | None:
    """Take the confidences out of received fields and numbers; None if they hold none."""
    codes = fields.pop("codes", None)
    if codes is None:
        return None
    return QuantizedLogWeights(to_torch(codes), pop_meta(meta, "lo", float), pop_meta(meta, "step", float))


def check_confidence(confidence: QuantizedLogWeights | None, count: int, what: str) -> None:
    """Reject confidences that are invalid or whose number is not `count`; `what` names the rows in the error."""
    if confidence is not None:
        confidence.validate()
        if len(confidence.codes) != count:
            raise RejectedMessageError(f"{count} {what} with {len(confidence.codes)} confidences")
