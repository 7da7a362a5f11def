"""Conversion and checks of messages' arrays and numbers, shared by the message types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError, UserError
from fdl.messages.base import Meta
from fdl.state.float_formats import BFLOAT16

_Value = TypeVar("_Value", int, float, str)


def to_numpy(name: str, tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array that shares its memory if possible; `UserError` for one that cannot be sent."""
    try:
        return tensor.numpy(force=True)
    except (TypeError, RuntimeError):
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(BFLOAT16)
        raise UserError(f"tensor {name!r} of {tensor.dtype} and layout {tensor.layout} cannot be sent") from None


def to_torch(array: np.ndarray) -> Tensor:
    """Return a received array as a tensor that shares its memory."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def pop_meta(meta: Meta, key: str, kind: type[_Value]) -> _Value:
    """Take a number or string out of received `meta`; reject one that is missing or of another type."""
    value = meta.pop(key, None)
    if type(value) is not kind:
        raise RejectedMessageError(f"{key!r} must be sent as {kind.__name__}, got {value!r:.40}")
    return value


def samples_told(samples: int) -> Meta:
    """Return a sample count as metadata: nothing for 0, which stands for a count that is not reported."""
    return {"samples": int(samples)} if samples else {}


def take_samples(meta: Meta) -> int:
    """Take a sample count out of received `meta`; 0 if none was reported."""
    return pop_meta(meta, "samples", int) if "samples" in meta else 0


def reject_leftovers(mapping: Mapping) -> None:
    """Reject received fields or numbers that are left after all expected ones were taken out."""
    if mapping:
        raise RejectedMessageError(f"unexpected content {next(iter(mapping))!r:.80}")


def check_sample_count(samples: int) -> None:
    """Reject a negative sample count."""
    if samples < 0:
        raise RejectedMessageError(f"sample count is negative: {samples}")


def check_finite(what: str, tensor: Tensor) -> None:
    """Reject a tensor with NaN or infinity; `what` names it in the error."""
    # A sum is finite only if every term is; it may overflow without that, so a bad sum proves nothing.
    if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise RejectedMessageError(f"{what:.100} is not finite")


def smallest_int_dtype(name: str, integers: Tensor) -> np.ndarray:
    """Return integers in the narrowest dtype that holds them all."""
    array = to_numpy(name, integers)
    if array.size == 0:
        return array.astype(np.uint8)
    return array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))


def take_integers(fields: dict[str, np.ndarray], name: str, most: int) -> Tensor | None:
    """Take a vector of at most `most` integers, widened to int64; its length is checked before that."""
    array = fields.pop(name, None)
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.size > most:
        raise RejectedMessageError(f"{name!r} must be at most {most} whole numbers, got {array.size} of {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))
