"""What may cross the wire: frozen, typed messages that check themselves.

A message gives the wire named arrays (`fields`) and a few numbers (`meta`), and is built from them on the other side.
The receiver trusts neither: `build` refuses what is missing or of a wrong type, `validate` what makes no sense.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RefusedError, UserError
from fdl.floats import BFLOAT16

Meta = dict[str, int | float | str]
Form = Literal["logits", "probabilities", "embeddings"]

_FORMS = get_args(Form)  # the order is the wire format: new forms go to the end
_TYPES: dict[int, type[Message]] = {}


class Message(ABC):
    """What one participant sends to another in one round.

    A message type is a frozen dataclass with `eq=False` (comparing tensors has no single truth value) and literal
    `kind`, its name in the ledger, and `code`, its number on the wire.
    """

    kind: ClassVar[str]
    code: ClassVar[int]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        other = _TYPES.setdefault(cls.code, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__name__} and {other.__name__} have the same wire code {cls.code}")

    @abstractmethod
    def fields(self) -> dict[str, np.ndarray]:
        """Return the arrays to send; they may share memory with the message."""

    @abstractmethod
    def meta(self) -> Meta:
        """Return the numbers and short strings to send."""

    @classmethod
    @abstractmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Message:
        """Return the message that gave these fields and numbers; the arrays' memory is taken over.

        Raises:
            RefusedError: something is missing, superfluous or of a wrong type.
        """

    @abstractmethod
    def validate(self) -> None:
        """Check ranks, lengths and values.

        Raises:
            RefusedError: with the reason; the sender is the caller's to name.
        """


def message_type(code: int) -> type[Message]:
    """Return the class of a wire code, or raise RefusedError."""
    try:
        return _TYPES[code]
    except KeyError:
        raise RefusedError(f"unknown message type {code}") from None


@dataclass(frozen=True, eq=False)
class Parameters(Message):
    """Weights and buffers of a model, or an update of them.

    Attributes:
        tensors: by name; booleans, integers and real numbers of any dtype and shape. Integers and booleans (counters
            of BatchNorm) cross every chain unchanged.
        samples: how many examples the sender trained on, 0 from the server.
    """

    kind: ClassVar[str] = "parameters"
    code: ClassVar[int] = 1

    tensors: Mapping[str, Tensor]
    samples: int = 0

    def fields(self) -> dict[str, np.ndarray]:
        """One array a tensor."""
        return {name: _to_numpy(name, tensor) for name, tensor in self.tensors.items()}

    def meta(self) -> Meta:
        """The sample count."""
        return {"samples": int(self.samples)}

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Parameters:
        """Inverse of `fields` and `meta`."""
        meta = dict(meta)
        samples = _take_meta(meta, "samples", int)
        _nothing_left(meta)
        return cls(_side_by_side(fields) or {name: _to_torch(array) for name, array in fields.items()}, samples)

    def validate(self) -> None:
        """Every number is finite."""
        _check_samples(self.samples)
        whole = as_one(self.tensors.values())
        if whole is not None and math.isfinite(whole.sum()):
            return
        for name, tensor in self.tensors.items():
            _check_finite(f"tensor {name!r}", tensor)


@dataclass(frozen=True, eq=False)
class Confidences:
    """One log-weight a proxy row, in 8 bits: value = lo + step · code.

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
    def quantize(cls, log_weights: Tensor) -> Confidences:
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
            raise RefusedError("confidence codes must be a vector of 8-bit numbers")
        if not (math.isfinite(self.lo) and math.isfinite(self.step) and self.step >= 0):
            raise RefusedError(f"confidence scale is not usable: lo {self.lo}, step {self.step}")


@dataclass(frozen=True, eq=False)
class Responses(Message):
    """What a model answers for rows of the proxy set.

    Attributes:
        values: float [n, C], logits, probabilities or embeddings.
        form: which of the three.
        rows: int64 [n], the rows of the proxy set, or None for the whole set in order.
        confidence: the sender's log-weight of every row, or None.
        samples: how many examples the sender trained on, 0 from the server.
    """

    kind: ClassVar[str] = "responses"
    code: ClassVar[int] = 2

    values: Tensor
    form: Form
    rows: Tensor | None = None
    confidence: Confidences | None = None
    samples: int = 0

    def fields(self) -> dict[str, np.ndarray]:
        """The values; rows in the narrowest unsigned integers that hold them; the confidence's codes."""
        fields = {"values": _to_numpy("values", self.values)}
        if self.rows is not None:
            rows = _to_numpy("rows", self.rows)
            if rows.size and rows.min() >= 0:
                rows = rows.astype(np.min_scalar_type(rows.max()))
            fields["rows"] = rows
        if self.confidence is not None:
            fields["codes"] = _to_numpy("codes", self.confidence.codes)
        return fields

    def meta(self) -> Meta:
        """The form's number, the sample count, the confidence's scale."""
        meta: Meta = {"form": _FORMS.index(self.form), "samples": int(self.samples)}
        if self.confidence is not None:
            meta |= {"lo": float(self.confidence.lo), "step": float(self.confidence.step)}
        return meta

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Responses:
        """Inverse of `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        form, samples = _take_meta(meta, "form", int), _take_meta(meta, "samples", int)
        if not 0 <= form < len(_FORMS) or "values" not in fields:
            raise RefusedError("responses without values or of an unknown form")
        values, rows, codes = fields.pop("values"), fields.pop("rows", None), fields.pop("codes", None)
        if rows is not None:
            # The length is looked at before the rows are widened: eight bytes a row are then no more than the values.
            if rows.dtype.kind not in "iu" or rows.size > values.size:
                raise RefusedError(f"{values.size} values with {rows.size} rows of {rows.dtype}")
            rows = torch.from_numpy(rows.astype(np.int64))
        confidence = None
        if codes is not None:
            confidence = Confidences(_to_torch(codes), _take_meta(meta, "lo", float), _take_meta(meta, "step", float))
        _nothing_left(meta)
        _nothing_left(fields)
        return cls(_to_torch(values), _FORMS[form], rows, confidence, samples)

    def validate(self) -> None:
        """A finite matrix; probabilities not negative; rows and confidence of the same length."""
        _check_samples(self.samples)
        values, rows, confidence = self.values, self.rows, self.confidence
        if self.form not in _FORMS:
            raise RefusedError(f"unknown form {self.form!r}")
        if values.ndim != 2 or not values.is_floating_point():
            raise RefusedError(f"responses must be a matrix of real numbers, got {values.dtype} {list(values.shape)}")
        if values.shape[1] < 1:
            raise RefusedError("responses have no columns")
        _check_finite("responses", values)
        if self.form == "probabilities" and values.numel() and values.min() < 0:
            raise RefusedError("a probability is negative")
        if rows is not None:
            if rows.dtype != torch.int64 or rows.shape != values.shape[:1]:
                raise RefusedError(f"{len(values)} responses need as many int64 rows, got {list(rows.shape)}")
            if rows.numel() and rows.min() < 0:
                raise RefusedError("a proxy row is negative")
        if confidence is not None:
            confidence.validate()
            if len(confidence.codes) != len(values):
                raise RefusedError(f"{len(values)} responses with {len(confidence.codes)} confidences")


def as_one(tensors: Iterable[Tensor]) -> Tensor | None:
    """All tensors as one vector, without a copy, where they lie side by side in one storage, as decoded ones do.

    Small models consist of small tensors, for which calling an operation costs more than the operation itself.

    Returns:
        A view of all elements in order; None where there is no such view.
    """
    tensors = list(tensors)
    if not tensors:
        return None
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.storage_offset() != end
            or not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != storage
        ):
            return None
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def _side_by_side(fields: Mapping[str, np.ndarray]) -> dict[str, Tensor] | None:
    """Float32 arrays that fill one buffer, in order, as tensors that share its storage; None for any others."""
    arrays = list(fields.values())
    base = arrays[0].base if arrays else None
    if not isinstance(base, bytearray) or any(a.base is not base or a.dtype != np.float32 for a in arrays):
        return None
    if sum(a.nbytes for a in arrays) != len(base):
        return None
    parts = torch.frombuffer(base, dtype=torch.float32).split([a.size for a in arrays])
    return {name: part.view(array.shape) for (name, array), part in zip(fields.items(), parts)}


def _to_numpy(name: str, tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        raise UserError(f"tensor {name!r} of {tensor.dtype} and layout {tensor.layout} cannot be sent") from None


def _to_torch(array: np.ndarray) -> Tensor:
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _take_meta(meta: Meta, key: str, kind: type) -> int | float | str:
    value = meta.pop(key, None)
    if type(value) is not kind:
        raise RefusedError(f"{key!r} must be sent as {kind.__name__}, got {value!r:.40}")
    return value


def _nothing_left(mapping: Mapping) -> None:
    if mapping:
        raise RefusedError(f"unexpected content {next(iter(mapping))!r:.80}")


def _check_samples(samples: int) -> None:
    if samples < 0:
        raise RefusedError(f"sample count is negative: {samples}")


def _check_finite(what: str, tensor: Tensor) -> None:
    # A sum is finite only if every term is; it may overflow without that, so a bad sum proves nothing.
    if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise RefusedError(f"{what:.100} is not finite")
