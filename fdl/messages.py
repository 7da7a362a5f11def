"""What may cross the wire: frozen, typed messages that check themselves.

A message gives the wire named arrays (`fields`) and a few numbers (`meta`), and is built from them on the other side.
The receiver trusts neither: `build` refuses what is missing or of a wrong type, `validate` what makes no sense.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RefusedError, UserError
from fdl.floats import BFLOAT16
from fdl.pieces import Pieces, as_one

Meta = dict[str, int | float | str]
Form = Literal["logits", "probabilities", "embeddings"]

_FORMS = get_args(Form)  # the order is the wire format: new forms go to the end
_TYPES: dict[int, type[Message]] = {}
_FLOAT32 = np.dtype(np.float32)


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

    def narrowed(self, share: float) -> Message | None:
        """Return the message with about this share of its content, the most useful part, for a link of few bytes.

        Args:
            share: in (0, 1).

        Returns:
            None where nothing can be left out, or nothing would be left.
        """
        return None

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
        samples = take_meta(meta, "samples", int)
        nothing_left(meta)
        return cls(_side_by_side(fields) or {name: to_torch(array) for name, array in fields.items()}, samples)

    @cached_property
    def whole(self) -> Tensor | None:
        """All tensors, in order, as one vector, where they lie side by side; see `as_one`."""
        return self.tensors.whole if isinstance(self.tensors, Pieces) else as_one(self.tensors.values())

    @cached_property
    def layout(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor, in order."""
        if isinstance(self.tensors, Pieces):
            return [(name, shape, torch.float32) for name, shape in self.tensors.shapes.items()]
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()]

    @cached_property
    def _checked(self) -> None:
        check_samples(self.samples)
        if self.whole is None or not math.isfinite(self.whole.sum()):
            for name, tensor in self.tensors.items():
                check_finite(f"tensor {name!r}", tensor)

    def validate(self) -> None:
        """Every number is finite. Looked at once: a message does not change."""
        return self._checked


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

    def narrowed(self, share: float) -> Responses | None:
        """The rows with the highest confidence, or with the clearest answer where none is sent, in their order."""
        keep = self.clearest(share)
        return self.taken(keep) if len(keep) else None

    def clearest(self, share: float) -> Tensor:
        """Places, rising, of the share of answers that are most sure of themselves; of embeddings, evenly spread."""
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

    def taken(self, keep: Tensor) -> Responses:
        """Only the answers at some places (int64)."""
        rows = keep if self.rows is None else self.rows[keep]
        return replace(self, values=self.values[keep], rows=rows, confidence=_taken(self.confidence, keep))

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Responses:
        """Inverse of `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        form, samples = take_meta(meta, "form", int), take_meta(meta, "samples", int)
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
            confidence = Confidences(to_torch(codes), take_meta(meta, "lo", float), take_meta(meta, "step", float))
        nothing_left(meta)
        nothing_left(fields)
        return cls(to_torch(values), _FORMS[form], rows, confidence, samples)

    def validate(self) -> None:
        """A finite matrix; probabilities not negative; rows and confidence of the same length."""
        check_samples(self.samples)
        values, rows, confidence = self.values, self.rows, self.confidence
        if self.form not in _FORMS:
            raise RefusedError(f"unknown form {self.form!r}")
        if values.ndim != 2 or not values.is_floating_point():
            raise RefusedError(f"responses must be a matrix of real numbers, got {values.dtype} {list(values.shape)}")
        if values.shape[1] < 1:
            raise RefusedError("responses have no columns")
        check_finite("responses", values)
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


def _side_by_side(fields: Mapping[str, np.ndarray]) -> Pieces | None:
    """Float32 arrays that fill one buffer, in order, as tensors that share its storage; None for any others."""
    base, size, shapes = None, 0, {}
    for name, array in fields.items():
        if base is None:
            base = array.base
            if type(base) is not bytearray or not base:
                return None
        if array.base is not base or array.dtype is not _FLOAT32:
            return None
        shapes[name] = array.shape
        size += array.size
    if base is None or 4 * size != len(base):
        return None
    return Pieces(torch.frombuffer(base, dtype=torch.float32), shapes)


def _to_numpy(name: str, tensor: Tensor) -> np.ndarray:
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


def take_meta(meta: Meta, key: str, kind: type) -> int | float | str:
    """Take a number or string out of what was received; refuses one that is missing or of another type."""
    value = meta.pop(key, None)
    if type(value) is not kind:
        raise RefusedError(f"{key!r} must be sent as {kind.__name__}, got {value!r:.40}")
    return value


def nothing_left(mapping: Mapping) -> None:
    """Refuse what is left of received fields or numbers after all that belongs there was taken out."""
    if mapping:
        raise RefusedError(f"unexpected content {next(iter(mapping))!r:.80}")


def check_samples(samples: int) -> None:
    """Refuse a negative sample count."""
    if samples < 0:
        raise RefusedError(f"sample count is negative: {samples}")


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse a tensor with numbers that are none, or infinite."""
    # A sum is finite only if every term is; it may overflow without that, so a bad sum proves nothing.
    if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise RefusedError(f"{what:.100} is not finite")


@dataclass(frozen=True, eq=False)
class Features(Message):
    """Activations of named layers for rows of the proxy set, pooled to one vector a row.

    Attributes:
        layers: by name of the layer, float [n, d]; every layer may have its own d.
        rows: int64 [n], the rows of the proxy set, or None for the whole set in order.
        confidence: the sender's log-weight of every row, or None; then that of the responses it is sent with counts.
    """

    kind: ClassVar[str] = "features"
    code: ClassVar[int] = 3

    layers: Mapping[str, Tensor]
    rows: Tensor | None = None
    confidence: Confidences | None = None

    def fields(self) -> dict[str, np.ndarray]:
        """One array a layer; rows in the narrowest integers that hold them; the confidence's codes."""
        fields = {f"layer/{name}": _to_numpy(name, values) for name, values in self.layers.items()}
        if self.rows is not None:
            fields["rows"] = narrow("rows", self.rows)
        return fields | _codes(self.confidence)

    def meta(self) -> Meta:
        """The confidence's scale."""
        return _scale(self.confidence)

    def taken(self, keep: Tensor) -> Features:
        """Only the rows at some places (int64)."""
        layers = {name: values[keep] for name, values in self.layers.items()}
        rows = keep if self.rows is None else self.rows[keep]
        return Features(layers, rows, _taken(self.confidence, keep))

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Features:
        """Inverse of `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        names = [name for name in fields if name.startswith("layer/")]
        layers = {name.removeprefix("layer/"): to_torch(fields.pop(name)) for name in names}
        most = max((len(values) if values.ndim else 0 for values in layers.values()), default=0)
        rows = take_integers(fields, "rows", most)
        confidence = _take_confidence(fields, meta)
        nothing_left(meta)
        nothing_left(fields)
        return cls(layers, rows, confidence)

    def validate(self) -> None:
        """At least one layer; finite matrices, rows and confidence of one length."""
        if not self.layers:
            raise RefusedError("features without a layer")
        first = next(iter(self.layers.values()))
        count = len(first) if first.ndim else 0
        for name, values in self.layers.items():
            if values.ndim != 2 or not values.is_floating_point() or values.shape[1] < 1:
                raise RefusedError(
                    f"features of {name!r:.80} must be a matrix of real numbers, got {values.dtype} "
                    f"{list(values.shape)}"
                )
            if len(values) != count:
                raise RefusedError(f"layer {name!r:.80} has {len(values)} rows, another has {count}")
            check_finite(f"layer {name!r:.80}", values)
        if self.rows is not None:
            if self.rows.dtype != torch.int64 or self.rows.shape != (count,):
                raise RefusedError(f"{count} features need as many int64 rows, got {list(self.rows.shape)}")
            if self.rows.numel() and self.rows.min() < 0:
                raise RefusedError("a proxy row is negative")
        _check_confidence(self.confidence, count, "features")


@dataclass(frozen=True, eq=False)
class Prototypes(Message):
    """Centroids of a sender's own data, a few for each class or concept.

    Attributes:
        values: float [m, d].
        labels: int64 [m], the class of each; -1 throughout where there are no classes.
        counts: int64 [m], how many samples each stands for, at least 1.
        confidence: the sender's log-weight of every prototype, or None.
    """

    kind: ClassVar[str] = "prototypes"
    code: ClassVar[int] = 4

    values: Tensor
    labels: Tensor
    counts: Tensor
    confidence: Confidences | None = None

    def fields(self) -> dict[str, np.ndarray]:
        """The values; labels and counts in the narrowest integers that hold them; the confidence's codes."""
        fields = {"values": _to_numpy("values", self.values)}
        fields |= {"labels": narrow("labels", self.labels), "counts": narrow("counts", self.counts)}
        return fields | _codes(self.confidence)

    def meta(self) -> Meta:
        """The confidence's scale."""
        return _scale(self.confidence)

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Prototypes:
        """Inverse of `fields` and `meta`."""
        fields, meta = dict(fields), dict(meta)
        if "values" not in fields:
            raise RefusedError("prototypes without values")
        values = to_torch(fields.pop("values"))
        labels, counts = (take_integers(fields, name, values.numel()) for name in ("labels", "counts"))
        if labels is None or counts is None:
            raise RefusedError("prototypes without labels or counts")
        confidence = _take_confidence(fields, meta)
        nothing_left(meta)
        nothing_left(fields)
        return cls(values, labels, counts, confidence)

    def validate(self) -> None:
        """A finite matrix; labels from -1, counts from 1 and confidence of the same length."""
        values = self.values
        if values.ndim != 2 or not values.is_floating_point() or values.shape[1] < 1:
            raise RefusedError(f"prototypes must be a matrix of real numbers, got {values.dtype} {list(values.shape)}")
        check_finite("prototypes", values)
        for name, numbers, least in (("labels", self.labels, -1), ("counts", self.counts, 1)):
            if numbers.dtype != torch.int64 or numbers.shape != values.shape[:1]:
                raise RefusedError(f"{len(values)} prototypes need as many int64 {name}, got {list(numbers.shape)}")
            if numbers.numel() and numbers.min() < least:
                raise RefusedError(f"{name} of prototypes must be at least {least}, got {int(numbers.min())}")
        _check_confidence(self.confidence, len(values), "prototypes")


@dataclass(frozen=True, eq=False)
class Standing(Message):
    """Which answers of a client are in force, in a few bytes: no others are sent while these still hold.

    From the server it says of which round it holds answers; from a client, that these still are what it would say.

    Attributes:
        round: the round in which the answers were sent, 0 for none.
        wanted: from the server, whether it wants others at all; from a client always true.
    """

    kind: ClassVar[str] = "standing"
    code: ClassVar[int] = 5

    round: int
    wanted: bool = True

    def fields(self) -> dict[str, np.ndarray]:
        """No arrays."""
        return {}

    def meta(self) -> Meta:
        """Both numbers."""
        return {"round": int(self.round), "wanted": int(self.wanted)}

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Standing:
        """Inverse of `meta`."""
        meta = dict(meta)
        round, wanted = take_meta(meta, "round", int), take_meta(meta, "wanted", int)
        nothing_left(meta)
        nothing_left(fields)
        if wanted not in (0, 1):
            raise RefusedError(f"'wanted' must be 0 or 1, got {wanted}")
        return cls(round, bool(wanted))

    def validate(self) -> None:
        """No negative round."""
        if self.round < 0:
            raise RefusedError(f"round is negative: {self.round}")


@dataclass(frozen=True, eq=False)
class Bundle:
    """Several messages that go together; each is packed and counted by itself, under its own kind.

    Attributes:
        parts: at most one of each type.
    """

    parts: tuple[Message, ...]

    def __post_init__(self) -> None:
        """Parts are found by their type, so there is one of each."""
        if len({type(part) for part in self.parts}) < len(self.parts):
            raise ValueError(f"a bundle of several {', '.join(part.kind for part in self.parts)}")

    def narrowed(self, share: float) -> Bundle | None:
        """As `Message.narrowed`: features stay those of the answers that are kept; other parts stay as they are."""
        parts = parts_of(self)
        keep = parts[Responses].clearest(share) if Responses in parts else ()
        if len(keep) == 0:
            return None
        rows = {type: parts[type].taken(keep) for type in (Responses, Features) if type in parts}
        return Bundle(tuple((parts | rows).values()))


def parts_of(message: Message | Bundle | None) -> dict[type[Message], Message]:
    """The parts of a bundle, or a single message, by type; nothing for None."""
    if message is None:
        return {}
    return {type(part): part for part in (message.parts if isinstance(message, Bundle) else (message,))}


def narrow(name: str, integers: Tensor) -> np.ndarray:
    """Integers in the narrowest type that holds them all."""
    array = _to_numpy(name, integers)
    if array.size == 0:
        return array.astype(np.uint8)
    return array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))


def take_integers(fields: dict[str, np.ndarray], name: str, most: int) -> Tensor | None:
    """A vector of integers, widened; its length is looked at before that."""
    array = fields.pop(name, None)
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.size > most:
        raise RefusedError(f"{name!r} must be at most {most} whole numbers, got {array.size} of {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _taken(confidence: Confidences | None, keep: Tensor) -> Confidences | None:
    return None if confidence is None else replace(confidence, codes=confidence.codes[keep])


def _codes(confidence: Confidences | None) -> dict[str, np.ndarray]:
    return {} if confidence is None else {"codes": _to_numpy("codes", confidence.codes)}


def _scale(confidence: Confidences | None) -> Meta:
    return {} if confidence is None else {"lo": float(confidence.lo), "step": float(confidence.step)}


def _take_confidence(fields: dict[str, np.ndarray], meta: Meta) -> Confidences | None:
    codes = fields.pop("codes", None)
    if codes is None:
        return None
    return Confidences(to_torch(codes), take_meta(meta, "lo", float), take_meta(meta, "step", float))


def _check_confidence(confidence: Confidences | None, count: int, what: str) -> None:
    if confidence is not None:
        confidence.validate()
        if len(confidence.codes) != count:
            raise RefusedError(f"{count} {what} with {len(confidence.codes)} confidences")
