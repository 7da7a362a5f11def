"""Arrays and numbers of messages, on their way out and in."""

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
    """A tensor as an array that shares its memory where it can; `UserError` for one that cannot be sent."""
    try:
        return tensor.numpy(force=True)
    except (TypeError, RuntimeError):
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(BFLOAT16)
        raise UserError(f"tensor {name!r} of {tensor.dtype} and layout {tensor.layout} cannot be sent") from None


def to_torch(array: np.ndarray) -> Tensor:
    """A received array as a tensor that shares its memory."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def pop_meta(meta: Meta, key: str, kind: type[_Value]) -> _Value:
    """Take a number or string out of what was received; refuses one that is missing or of another type."""
    value = meta.pop(key, None)
    if type(value) is not kind:
        raise RejectedMessageError(f"{key!r} must be sent as {kind.__name__}, got {value!r:.40}")
    return value


def samples_told(samples: int) -> Meta:
    """What is sent of a sample count: nothing where it is 0, so where the sender does not tell."""
    return {"samples": int(samples)} if samples else {}


def take_samples(meta: Meta) -> int:
    """Take a sample count out of what was received, 0 where none was told."""
    return pop_meta(meta, "samples", int) if "samples" in meta else 0


def reject_leftovers(mapping: Mapping) -> None:
    """Refuse what is left of received fields or numbers after all that belongs there was taken out."""
    if mapping:
        raise RejectedMessageError(f"unexpected content {next(iter(mapping))!r:.80}")


def check_sample_count(samples: int) -> None:
    """Refuse a negative sample count."""
    if samples < 0:
        raise RejectedMessageError(f"sample count is negative: {samples}")


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse a tensor with numbers that are none, or infinite."""
    # A sum is finite only if every term is; it may overflow without that, so a bad sum proves nothing.
    if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise RejectedMessageError(f"{what:.100} is not finite")


def smallest_int_dtype(name: str, integers: Tensor) -> np.ndarray:
    """Integers in the narrowest type that holds them all."""
    array = to_numpy(name, integers)
    if array.size == 0:
        return array.astype(np.uint8)
    return array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))


def take_integers(fields: dict[str, np.ndarray], name: str, most: int) -> Tensor | None:
    """A vector of integers, widened; its length is looked at before that."""
    array = fields.pop(name, None)
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.size > most:
        raise RejectedMessageError(f"{name!r} must be at most {most} whole numbers, got {array.size} of {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))
