"""Next-token predictions of a language model for proxy text, reduced to the likeliest or a few sampled ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.messages import (
    Message,
    Meta,
    check_finite,
    check_sample_count,
    pop_meta,
    reject_leftovers,
    samples_told,
    smallest_int_dtype,
    take_integers,
    take_samples,
    to_torch,
)

Sparsity = Literal["top", "sampled"]

FLOOR = 2.0**-23
"""Ids of less probability are not sent, nor is a smaller tail told from this: what float32 can tell from 0 beside 1."""

_FORMS = get_args(Sparsity)  # the order is the wire format: new forms go to the end
_WIDEST = 31
_CHUNK = 1 << 16  # numbers that are packed at a time; a multiple of 8, so that every chunk fills its bytes
_STEP = 0.125
_LARGEST = 2.0**27
_SLACK = 0.5  # how far above 0 rounding on the way may lift a log-probability


@dataclass(frozen=True, eq=False)
class TokenLogWeights:
    """One log-weight per token, in 8 bits, however large they grow along a window.

    They lie on a grid, and what is sent is by how many steps each differs from the one before it in its window, the
    first from 0. So errors do not add up: no value moves by more than step/2.

    Attributes:
        codes: uint8 [n, T].
        least: difference that code 0 stands for, in steps.
        step: of the grid, a power of two.
    """

    codes: Tensor
    least: int
    step: float

    @classmethod
    def quantize(cls, values: Tensor) -> TokenLogWeights:
        """Round log-weights [n, T] to the finest grid, from 1/8 up, on which all differences have a code.

        What is not finite is not hidden: the step becomes NaN, and the receiver refuses the message.
        """
        x = values.detach().to("cpu", torch.float64)
        differences = x.diff(dim=1, prepend=x.new_zeros(len(x), 1))
        span = float(differences.max() - differences.min()) if x.numel() else 0.0
        if x.numel() and not x.abs().max() < _LARGEST:
            return cls(torch.zeros(x.shape, dtype=torch.uint8), 0, math.nan)
        # rounding both ends of a difference may stretch it by one step
        step = max(_STEP, 2.0 ** math.ceil(math.log2(max(span / 254, _STEP))))
        steps = torch.round(x / step).to(torch.int64)
        codes = steps.diff(dim=1, prepend=steps.new_zeros(len(x), 1))
        least = int(codes.min()) if codes.numel() else 0
        return cls((codes - least).to(torch.uint8), least, step)

    def values(self) -> Tensor:
        """Return the log-weights as float32 [n, T]."""
        return ((self.codes.to(torch.int64) + self.least).cumsum(1).double() * self.step).float()

    def validate(self) -> None:
        """Check dtype, rank and scale."""
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise RejectedMessageError("codes of log-weights must be a matrix of 8-bit numbers")
        if not (0 < self.step < _LARGEST and abs(self.least) < 1 << 31):
            raise RejectedMessageError(f"scale of log-weights is not usable: step {self.step}, least {self.least}")


@dataclass(frozen=True, eq=False)
class SparseResponses(Message):
    """Next-token predictions of a language model at every position of proxy windows.

    The ids of all positions lie one behind the other, as many a position as `sizes` says, rising within each. Either
    these are the likeliest ids (``"top"``), with log-probabilities and what is left for all others, the tail; or
    ids drawn from the whole distribution (``"sampled"``), with how often each was drawn, which is an unbiased estimate
    of it (random sampling knowledge distillation, Anshumann et al. 2025).

    On the wire ids go as their distances, in the fewest bits that hold the largest. Log-probabilities are real numbers,
    which codec stages narrow: 8 bits of `quantize` from 1 down to the floor are steps of 1/16, an error of 3 %.

    Attributes:
        ids: int32 [S], in 0 … vocab - 1.
        values: log-probabilities, float [S], or counts of draws, uint8 [S].
        sizes: int32 [n, T], ids at each position; 0 for positions without a prediction.
        vocab: size of the vocabulary that the ids are from.
        tail: logarithm of the probability of all other ids, float [n, T], for the form ``"top"``.
        weights: the sender's log-weight of every position, or None.
        rows: int64 [n], the windows of the proxy set, or None for the whole set in order.
        samples: number of windows that the sender trained on; 0, which is not sent, if it does not report it.
    """

    kind: ClassVar[str] = "sparse_responses"
    code: ClassVar[int] = 6

    ids: Tensor
    values: Tensor
    sizes: Tensor
    vocab: int
    tail: Tensor | None = None
    weights: TokenLogWeights | None = None
    rows: Tensor | None = None
    samples: int = 0

    @property
    def form(self) -> Sparsity:
        """Form of the message: ``"top"`` for the likeliest ids, ``"sampled"`` for sampled ones."""
        return "sampled" if self.values.dtype == torch.uint8 else "top"

    @property
    def positions(self) -> Tensor:
        """Position of each id, counted through all windows, int64 [S]."""
        return torch.arange(self.sizes.numel()).repeat_interleave(self.sizes.flatten())

    def fields(self) -> dict[str, np.ndarray]:
        """Packed distances of ids, values, tail, sizes where they differ, codes of the weights, rows."""
        fields = {"ids": pack_bits(self._distances, self._width), "values": self.values.numpy(force=True)}
        if self.tail is not None:
            fields["tail"] = self.tail.flatten().numpy(force=True)
        if not self._alike:
            fields["sizes"] = smallest_int_dtype("sizes", self.sizes)
        if self.weights is not None:
            fields["weights"] = self.weights.codes.numpy(force=True)
        if self.rows is not None:
            fields["rows"] = smallest_int_dtype("rows", self.rows)
        return fields

    def meta(self) -> Meta:
        """Form, vocabulary, bits of a distance, samples; the ids a position where all have as many; weights' scale."""
        meta: Meta = {"form": _FORMS.index(self.form), "vocab": self.vocab, "width": self._width}
        meta |= samples_told(self.samples)
        if self._alike:
            meta |= {"size": int(self.sizes[0, 0]), "length": self.sizes.shape[1]}
        if self.weights is not None:
            meta |= {"least": int(self.weights.least), "step": float(self.weights.step)}
        return meta

    @cached_property
    def _distances(self) -> np.ndarray:
        return _distances(self.ids.numpy(force=True), self.sizes.numpy(force=True))

    @property
    def _width(self) -> int:
        """Bits of the largest distance."""
        return max(1, int(self._distances.max()).bit_length()) if self._distances.size else 1

    @cached_property
    def _alike(self) -> bool:
        """Return True if every position has the same, non-zero number of ids."""
        return self.sizes.numel() > 0 and bool((self.sizes == self.sizes[0, 0]).all()) and int(self.sizes[0, 0]) > 0

    def truncated(self, share: float) -> SparseResponses | None:
        """The windows that weigh most, which are those the sender knows best; without weights, evenly spread ones."""
        total = len(self.sizes)
        count = int(share * total)
        if self.weights is None:
            keep = torch.arange(count) * total // max(count, 1)
        else:
            known = self.weights.values().mean(1)
            keep = known.argsort(descending=True, stable=True)[:count].sort().values
        return self.select_rows(keep) if count else None

    def select_rows(self, keep: Tensor) -> SparseResponses:
        """Only the windows at some places, int64, rising."""
        chosen = torch.zeros(len(self.sizes), dtype=torch.bool)
        chosen[keep] = True
        of_id = chosen.repeat_interleave(self.sizes.sum(1))
        return replace(
            self,
            ids=self.ids[of_id],
            values=self.values[of_id],
            sizes=self.sizes[keep],
            tail=None if self.tail is None else self.tail[keep],
            weights=None if self.weights is None else replace(self.weights, codes=self.weights.codes[keep]),
            rows=keep if self.rows is None else self.rows[keep],
        )

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> SparseResponses:
        """Inverse of `fields` and `meta`; every length is compared with what was received before memory is taken."""
        fields, meta = dict(fields), dict(meta)
        form, vocab, width = (pop_meta(meta, key, int) for key in ("form", "vocab", "width"))
        samples = take_samples(meta)
        packed, values = fields.pop("ids", None), fields.pop("values", None)
        if packed is None or values is None or values.ndim != 1 or not 0 <= form < len(_FORMS):
            raise RejectedMessageError("sparse responses without ids or values, or of an unknown form")
        if (values.dtype == np.uint8) != (_FORMS[form] == "sampled"):
            raise RejectedMessageError(f"values of {values.dtype} in the form {_FORMS[form]!r}")
        sizes = _sizes(fields, meta, values.size)
        if not 1 <= width <= _WIDEST or packed.dtype != np.uint8 or packed.shape != (-(-values.size * width // 8),):
            raise RejectedMessageError(f"{values.size} ids of {width} bits in {packed.dtype} {list(packed.shape)}")
        tail = fields.pop("tail", None)
        if tail is not None and tail.size != sizes.size:
            raise RejectedMessageError(f"{sizes.size} positions with a tail of {tail.size}")
        weights = fields.pop("weights", None)
        if weights is not None:
            weights = TokenLogWeights(to_torch(weights), pop_meta(meta, "least", int), pop_meta(meta, "step", float))
        rows = take_integers(fields, "rows", len(sizes))
        reject_leftovers(meta)
        reject_leftovers(fields)
        ids = _ids(unpack_bits(packed, width, values.size), sizes)
        if ids.size and int(ids.max()) >= min(vocab, 1 << 31):
            raise RejectedMessageError(f"an id lies outside of a vocabulary of {vocab}")
        tail = None if tail is None else to_torch(tail.reshape(sizes.shape))
        ids, sizes = torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(sizes.astype(np.int32))
        return cls(ids, to_torch(values), sizes, vocab, tail, weights, rows, samples)

    def validate(self) -> None:
        """Ids rise within a position and are of the vocabulary; log-probabilities; one weight a position."""
        check_sample_count(self.samples)
        ids, values, sizes = self.ids, self.values, self.sizes
        if sizes.ndim != 2 or ids.shape != values.shape or ids.ndim != 1 or int(sizes.sum()) != len(ids):
            raise RejectedMessageError(f"{int(sizes.sum())} ids announced, {len(ids)} with {len(values)} values sent")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            raise RejectedMessageError(f"an id lies outside of a vocabulary of {self.vocab}")
        if not ((ids.diff() > 0) | (self.positions.diff() > 0)).all():
            raise RejectedMessageError("ids of a position do not rise")
        if (self.tail is None) != (self.form == "sampled"):
            raise RejectedMessageError("the likeliest ids need a tail, and drawn ones have none")
        if self.form == "sampled":
            if not (values > 0).all():
                raise RejectedMessageError("an id that was drawn not even once")
        else:
            for name, logs in (("log-probabilities", values), ("tails", self.tail)):
                if not logs.is_floating_point():
                    raise RejectedMessageError(f"{name} must be real numbers, got {logs.dtype}")
                check_finite(name, logs)
                if logs.numel() and logs.max() > _SLACK:
                    raise RejectedMessageError(f"{name} above 0")
            if self.tail.shape != sizes.shape:
                raise RejectedMessageError(f"tails {list(self.tail.shape)} for positions {list(sizes.shape)}")
        if self.weights is not None:
            self.weights.validate()
            if self.weights.codes.shape != sizes.shape:
                raise RejectedMessageError(
                    f"weights {list(self.weights.codes.shape)} for positions {list(sizes.shape)}"
                )
        if self.rows is not None:
            if self.rows.dtype != torch.int64 or self.rows.shape != sizes.shape[:1]:
                raise RejectedMessageError(f"{len(sizes)} windows need as many int64 rows, got {list(self.rows.shape)}")
            if self.rows.numel() and self.rows.min() < 0:
                raise RejectedMessageError("a proxy row is negative")


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Numbers in [0, 2**width) as bits, the lowest first, one number behind the other, uint8 [⌈n·width/8⌉].

    Example:
        >>> import numpy as np
        >>> pack_bits(np.array([1, 2, 3]), width=2)
        array([57], dtype=uint8)
    """
    places = np.arange(width)
    parts = [
        np.packbits((values[start : start + _CHUNK, None] >> places & 1).astype(np.uint8), bitorder="little")
        for start in range(0, values.size, _CHUNK)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """Undo `pack_bits`: the first `count` numbers, int64.

    Example:
        >>> import numpy as np
        >>> unpack_bits(np.uint8([0b111001]), width=2, count=3)
        array([1, 2, 3])
    """
    values = np.empty(count, np.int64)
    powers = 1 << np.arange(width)
    for start in range(0, count, _CHUNK):
        part = values[start : start + _CHUNK]
        chunk = packed[start * width // 8 :][: -(-part.size * width // 8)]
        bits = np.unpackbits(chunk, count=part.size * width, bitorder="little")
        part[:] = bits.reshape(-1, width) @ powers
    return values


def _distances(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Distance of each id from the least possible one, int64: the first above 0, others above the last."""
    distances = np.diff(ids.astype(np.int64), prepend=-1) - 1
    firsts = _firsts(sizes)
    distances[firsts] = ids[firsts]
    return distances


def _ids(distances: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Undo `_distances`."""
    reached = np.cumsum(distances + 1)
    firsts = _firsts(sizes)
    before = reached[firsts] - distances[firsts] - 1
    counts = sizes.reshape(-1)
    return reached - np.repeat(before, counts[counts > 0]) - 1


def _firsts(sizes: np.ndarray) -> np.ndarray:
    """Return the start of the ids of each position that has some."""
    counts = sizes.reshape(-1).astype(np.int64)
    return (np.cumsum(counts) - counts)[counts > 0]


def _sizes(fields: dict[str, np.ndarray], meta: Meta, total: int) -> np.ndarray:
    """Ids at each position [n, T], as sent or all alike; there are `total` in all."""
    sizes = fields.pop("sizes", None)
    if sizes is None:
        size, length = pop_meta(meta, "size", int), pop_meta(meta, "length", int)
        if min(size, length, total) < 1 or total % (size * length):
            raise RejectedMessageError(f"{total} ids do not fill windows of {length} positions with {size} each")
        return np.full((total // (size * length), length), size)
    if sizes.ndim != 2 or sizes.dtype.kind != "u" or sizes.itemsize > 4 or int(sizes.sum(dtype=np.uint64)) != total:
        raise RejectedMessageError(f"{total} ids with sizes of {sizes.dtype} {list(sizes.shape)}")
    return sizes
