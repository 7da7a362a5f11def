"""Uniform quantisation with a scale for every row."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from fdl.comm.stage import ArrayStage, Coded, Spec
from fdl.errors import UserError
from fdl.floats import narrow, widen

_LEAST_ROW = 16
_HALF, _FULL = 1, 2  # variants: the scales in float16, or in full precision


class Quantize(ArrayStage):
    """Send real numbers as integer codes of 8, 4, 2 or 1 bits between the ends of their row.

    A row is what shares one scale: the last axis, joined with the axes before it (but never the first) while it is
    shorter than 16 values, so a convolution kernel has one scale for each output channel and a response one for each
    sample. With step = (max − min) / (2**bits − 1) of a row, no value moves by more than step/2 under nearest
    rounding and by more than step under stochastic rounding, which is unbiased: x̂ = lo + step·⌊(x − lo)/step + U⌋
    with U uniform in [0, 1). The ends are sent as float16, rounded outwards, wherever that widens no row by more
    than 1/64, and as float32 (float64 for float64 arrays) elsewhere; this 1/64, and the rounding of the
    array's own format, are all that the bound can be missed by. A constant row comes back exactly.

    One bit under nearest rounding splits a row at the middle of its range and sends the mean of either half (the
    ends would turn a bell-shaped row into its own outliers); the row's mean is kept and the bound is the same.

    NaN or infinity anywhere in a row, or ends so far apart that their difference overflows float64, spoil that row:
    it decodes to something that is not finite, and the receiver refuses the message.

    Args:
        bits: width of a code.
        rounding: to the nearest code, or to one of the two neighbours at random.
        granularity: one scale a row, or one for the whole array.
    """

    name = "quantize"

    def __init__(
        self,
        bits: Literal[8, 4, 2, 1] = 8,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        granularity: Literal["row", "tensor"] = "row",
    ):
        if isinstance(bits, bool) or bits not in (8, 4, 2, 1):
            raise UserError(f"bits must be 8, 4, 2 or 1, got {bits!r}")
        if rounding not in ("nearest", "stochastic"):
            raise UserError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
        if granularity not in ("row", "tensor"):
            raise UserError(f"granularity must be 'row' or 'tensor', got {granularity!r}")
        self.bits, self.rounding, self.granularity = bits, rounding, granularity
        self._levels = 2**bits - 1

    @property
    def signature(self) -> str:
        """Name, width and granularity; how the sender rounded does not matter to the receiver."""
        return f"{self.name}/{self.bits}/{self.granularity}"

    def draws(self) -> bool:
        """Only stochastic rounding needs random numbers."""
        return self.rounding == "stochastic"

    def encode(self, array: np.ndarray, rng: np.random.Generator | None) -> Coded:
        """Return packed codes (uint8 [bytes]) and the rows' ends (float [2, rows])."""
        x = widen(array).reshape(self._rows(array.shape))
        with np.errstate(all="ignore"):  # a row that is not finite gives ends that are not, and no warning
            low, high = _by_row(np.minimum, x), _by_row(np.maximum, x)
            if self.bits == 1 and self.rounding == "nearest":
                above = x > (0.5 * low + 0.5 * high)[:, None]
                variant, ends = _round_ends(*_half_means(x, above, low, high), low, high)
                codes = above.view(np.uint8)
            else:
                variant, ends = _round_ends(low, high, low, high)
                codes = self._codes(x, variant, ends, rng)
        return Coded(variant, _pack(codes.reshape(-1), self.bits), (ends,))

    def layout(self, spec: Spec, variant: int) -> tuple[Spec, ...]:
        """Packed codes, then the rows' ends."""
        if variant not in (_HALF, _FULL):
            raise self.unknown(variant)
        full = np.float64 if spec.dtype.itemsize == 8 else np.float32
        packed = Spec(np.dtype(np.uint8), (-(-spec.size * self.bits // 8),))
        return packed, Spec(np.dtype(np.float16 if variant == _HALF else full), (2, self._rows(spec.shape)[0]))

    def decode(self, spec: Spec, variant: int, main: np.ndarray, sides: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return lo + step·code for every value."""
        dtype = _working_dtype(spec.dtype.itemsize, variant)
        with np.errstate(all="ignore"):
            lo, step = self._scale(sides[0], dtype)
            x = _unpack(main, self.bits, spec.size).astype(dtype).reshape(self._rows(spec.shape))
            x *= step[:, None]
            x += lo[:, None]
        return narrow(x.reshape(spec.shape), spec.dtype)

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return (rows, values in a row) of an array that is not empty."""
        first = len(shape) - 1
        while first > 1 and math.prod(shape[first:]) < _LEAST_ROW:
            first -= 1
        row = math.prod(shape if self.granularity == "tensor" else shape[first:])
        return math.prod(shape) // row, row

    def _scale(self, ends: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
        """Return lo and step of every row, calculated from what is sent, so that both sides agree."""
        lo, hi = ends.astype(np.float64)
        return lo.astype(dtype), ((hi - lo) / self._levels).astype(dtype)

    def _codes(self, x: np.ndarray, variant: int, ends: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        dtype = _working_dtype(x.dtype.itemsize, variant)
        lo, step = self._scale(ends, dtype)
        u = x - lo[:, None]
        u *= np.where(step > np.finfo(dtype).tiny, 1 / step, 0).astype(dtype)[:, None]
        if self.rounding == "nearest":
            u += dtype(0.5)
            return u.astype(np.uint8)
        u += rng.random(u.shape, dtype=dtype)
        # At the row's end, noise may round up to one code more than there is.
        return np.minimum(u.astype(np.uint16), np.uint16(self._levels)).astype(np.uint8)


def _working_dtype(itemsize: int, variant: int) -> type:
    """Float32 where ends in half precision show that range and offset are alike, float64 elsewhere."""
    return np.float64 if itemsize == 8 or variant == _FULL else np.float32


def _by_row(operation: np.ufunc, x: np.ndarray) -> np.ndarray:
    """Reduce every row of x [rows, n]; twice as fast as ``reduce(axis=1)`` for rows of a hundred values."""
    return operation.reduceat(x.reshape(-1), np.arange(0, x.size, x.shape[1]))


def _round_ends(lo: np.ndarray, hi: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the variant and the ends [2, rows] to send for the exact ends lo, hi of rows that span low … high."""
    exact = np.stack([lo, hi]).astype(np.float64)
    ends = _outwards(exact, np.float16)
    slack = (high.astype(np.float64) - low) / 128
    if np.all(np.abs(ends - exact) <= slack):
        return _HALF, ends
    return _FULL, _outwards(exact, low.dtype.type)


def _outwards(ends: np.ndarray, dtype: type) -> np.ndarray:
    """Round the lower ends down and the upper ends up."""
    rounded = ends.astype(dtype)
    missed = np.stack([rounded[0] > ends[0], rounded[1] < ends[1]])
    away = np.array([[-np.inf], [np.inf]], dtype)
    return np.where(missed, np.nextafter(rounded, away), rounded)


def _half_means(x: np.ndarray, above: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of the values below and of those above the split, for every row."""
    count = above.sum(axis=1)
    part = x * above
    upper = _by_row(np.add, part)
    lower = _by_row(np.add, np.subtract(x, part, out=part))
    # A mean may leave its values by a rounding error; the clip brings a constant row back to its exact value.
    lo = np.clip(lower / (x.shape[1] - count), low, high)
    return lo, np.where(count > 0, np.clip(upper / np.maximum(count, 1), low, high), lo)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes uint8 [n] into bytes, the first code in the lowest bits."""
    if bits == 8:
        return codes
    group = 8 // bits
    if codes.size % group:
        codes = np.concatenate([codes, np.zeros(-codes.size % group, np.uint8)])
    packed = codes[::group].copy()
    for place in range(1, group):
        packed |= codes[place::group] << np.uint8(place * bits)
    return packed


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo `_pack`: the first `count` codes, uint8."""
    if bits == 8:
        return packed
    group = 8 // bits
    codes = np.empty((packed.size, group), np.uint8)
    for place in range(group):
        codes[:, place] = (packed >> np.uint8(place * bits)) & np.uint8(2**bits - 1)
    return codes.reshape(-1)[:count]
