"""Uniform quantisation with a scale for every row."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray
from fdl.errors import UserError
from fdl.state.float_formats import narrow, widen

_LEAST_ROW = 16
_BITS = (8, 4, 2, 1)
_HALF, _FULL = 1, 2  # the scales in float16, or in full precision; a variant is one of these + 2 · index of the bits


class Quantize(ArrayStage):
    """Send real numbers as integer codes of 8, 4, 2 or 1 bits between the ends of their row.

    A row is what shares one scale: the last axis, joined with the axes before it (but never the first) while it is
    shorter than 16 values, so a convolution kernel has one scale for each output channel and a response one for each
    sample. With step = (max − min) / (2**bits − 1) of a row, no value moves by more than step/2 under nearest
    rounding and by more than step under stochastic rounding, which is unbiased: x̂ = lo + step·⌊(x − lo)/step + U⌋
    with U uniform among the multiples of 2**-16 in [0, 1). The ends are sent as float16, rounded outwards, wherever
    that widens no row by more than 1/64, and as float32 (float64 for float64 arrays) elsewhere; this 1/64, and the
    rounding of the array's own format, are all that the bound can be missed by. A constant row comes back exactly.

    One bit under nearest rounding splits a row at the middle of its range and sends the mean of either half (the
    ends would turn a bell-shaped row into its own outliers); the row's mean is kept and the bound is the same.

    NaN or infinity anywhere in a row, or ends so far apart that their difference overflows float64, spoil that row:
    it decodes to something that is not finite, and the receiver refuses the message.

    A message says how many bits it has, so the width may change from round to round, and a receiver needs no schedule.

    Args:
        bits: width of a code.
        rounding: to the nearest code, or to one of the two neighbours at random.
        granularity: one scale per row, or one for the whole array.
        schedule: pairs of a round and the bits from then on, rising in the round; before the first, `bits` holds.

    Example:
        >>> import numpy as np
        >>> from fdl.comm.stages.base import CodecContext
        >>> turn = CodecContext(np.random.default_rng(0))
        >>> encoded = Quantize(bits=8).encode(np.linspace(0, 1, 20, dtype=np.float32), turn)
        >>> encoded.main.dtype, encoded.main.size
        (dtype('uint8'), 20)
    """

    name = "quantize"

    def __init__(
        self,
        bits: Literal[8, 4, 2, 1] = 8,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        granularity: Literal["row", "tensor"] = "row",
        schedule: list[tuple[int, int]] | None = None,
    ):
        if isinstance(bits, bool) or bits not in _BITS:
            raise UserError(f"bits must be 8, 4, 2 or 1, got {bits!r}")
        if rounding not in ("nearest", "stochastic"):
            raise UserError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
        if granularity not in ("row", "tensor"):
            raise UserError(f"granularity must be 'row' or 'tensor', got {granularity!r}")
        self.bits, self.rounding, self.granularity = bits, rounding, granularity
        self.schedule = [(int(start), width) for start, width in schedule or ()]
        if any(isinstance(width, bool) or width not in _BITS for _, width in self.schedule):
            raise UserError(f"schedule must give 8, 4, 2 or 1 bits, got {schedule}")
        starts = [start for start, _ in self.schedule]
        if starts != sorted(set(starts)):
            raise UserError(f"schedule must be in the order of its rounds, each once, got {schedule}")

    @property
    def signature(self) -> str:
        """Name and granularity; a message tells its width, and how the sender rounded does not matter."""
        return f"{self.name}/{self.granularity}"

    def __str__(self) -> str:
        widths = [f"{start}:{bits}" for start, bits in self.schedule]
        return "/".join([self.name, ",".join([str(self.bits), *widths]), self.granularity])

    def bits_in(self, round: int) -> int:
        """Return the width of a code in a round."""
        bits = self.bits
        for start, width in self.schedule:
            bits = width if round >= start else bits
        return bits

    def draws(self) -> bool:
        """Only stochastic rounding needs random numbers."""
        return self.rounding == "stochastic"

    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray:
        """Return packed codes (uint8 [bytes]) and the rows' ends (float [2, rows])."""
        bits = self.bits_in(turn.round)
        x = widen(array).reshape(self._rows(array.shape))
        with np.errstate(all="ignore"):  # a row that is not finite gives ends that are not, and no warning
            low, high = _by_row(np.minimum, x), _by_row(np.maximum, x)
            if bits == 1 and self.rounding == "nearest":
                # halves of the smallest numbers round to 0, and no row may lie above its middle as a whole
                above = x > np.maximum(0.5 * low + 0.5 * high, low)[:, None]
                width, ends = _round_ends(*_half_means(x, above, low, high), low, high)
                codes = above.view(np.uint8)
            else:
                width, ends = _round_ends(low, high, low, high)
                codes = _codes(x, bits, width, ends, turn.rng if self.draws() else None)
        return EncodedArray(width + 2 * _BITS.index(bits), pack_codes(codes.reshape(-1), bits), (ends,))

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """Packed codes, then the rows' ends."""
        if not 1 <= variant <= 2 * len(_BITS):
            raise self.unknown(variant)
        width, bits = _split(variant)
        full = np.float64 if spec.dtype.itemsize == 8 else np.float32
        packed = ArraySpec(np.dtype(np.uint8), (-(-spec.size * bits // 8),))
        return packed, ArraySpec(np.dtype(np.float16 if width == _HALF else full), (2, self._rows(spec.shape)[0]))

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Return lo + step·code for every value."""
        width, bits = _split(coded.variant)
        dtype = _working_dtype(spec.dtype.itemsize, width)
        with np.errstate(all="ignore"):
            lo, step = _scale(coded.sides[0], bits, dtype)
            x = unpack_codes(coded.main, bits, spec.size).astype(dtype).reshape(self._rows(spec.shape))
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


def _split(variant: int) -> tuple[int, int]:
    """Return the scales' format and the bits of a variant."""
    return (variant - 1) % 2 + 1, _BITS[(variant - 1) // 2]


def _scale(ends: np.ndarray, bits: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Return lo and step of every row, calculated from what is sent, so that both sides agree."""
    lo, hi = ends.astype(np.float64)
    return lo.astype(dtype), ((hi - lo) / (2**bits - 1)).astype(dtype)


def _codes(x: np.ndarray, bits: int, width: int, ends: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Return the code of every value, rounded to the nearest, or at random where there is a source of noise."""
    dtype = _working_dtype(x.dtype.itemsize, width)
    lo, step = _scale(ends, bits, dtype)
    places = 0 if rng is None else 16
    u = x - lo[:, None]
    u *= np.where(step > np.finfo(dtype).tiny, 2**places / step, 0).astype(dtype)[:, None]
    if rng is None:
        u += dtype(0.5)
        return u.astype(np.uint8)
    # Fixed point, and 16 random bits below the point that carry into it with the fraction's probability. A row's end
    # may lie a rounding error beyond the last code, where noise would lift it to one code more than there is.
    fixed = u.astype(np.int32)
    np.minimum(fixed, np.int32((2**bits - 1) << places), out=fixed)
    fixed += rng.bit_generator.random_raw(-(-u.size // 4)).view(np.uint16)[: u.size].reshape(u.shape)
    fixed >>= places
    return fixed.astype(np.uint8)


def _working_dtype(itemsize: int, width: int) -> type:
    """Float32 where ends in half precision show that range and offset are alike, float64 elsewhere."""
    return np.float64 if itemsize == 8 or width == _FULL else np.float32


def _by_row(operation: np.ufunc, x: np.ndarray) -> np.ndarray:
    """Reduce every row of x [rows, n]; twice as fast as ``reduce(axis=1)`` for rows of a hundred values."""
    return operation.reduceat(x.reshape(-1), np.arange(0, x.size, x.shape[1]))


def _round_ends(lo: np.ndarray, hi: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[int, np.ndarray]:
    """Return format and values [2, rows] of the ends to send for exact ends lo, hi of rows that span low … high."""
    exact = np.stack([lo, hi]).astype(np.float64)
    ends = _outwards(exact, np.float16)
    slack = (high.astype(np.float64) - low) / 128
    if np.all(np.abs(ends - exact) <= slack):
        return _HALF, ends
    return _FULL, _outwards(exact, low.dtype.type)


def _outwards(ends: np.ndarray, dtype: type) -> np.ndarray:
    """Round the lower ends down and the upper ends up."""
    if dtype is np.float16:
        # numpy takes 30 ns to make a subnormal half, so these multiples of 2**-24 are written as the integers they are
        tiny = np.abs(ends) < 2**-14
        rounded = np.where(tiny, 0, ends).astype(np.float16)
        units = np.where(tiny, ends * 2**24, 0)
        np.floor(units[0], out=units[0])
        np.ceil(units[1], out=units[1])
        bits = np.abs(units).astype(np.uint16) | (units < 0).astype(np.uint16) << np.uint16(15)
        np.copyto(rounded.view(np.uint16), bits, where=tiny)
    else:
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


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes uint8 [n] into bytes, the first code in the lowest bits.

    Example:
        >>> import numpy as np
        >>> pack_codes(np.uint8([1, 2, 3, 0]), bits=2)
        array([57], dtype=uint8)
    """
    if bits == 8:
        return codes
    group = 8 // bits
    if codes.size % group:
        codes = np.concatenate([codes, np.zeros(-codes.size % group, np.uint8)])
    packed = codes[::group].copy()
    for place in range(1, group):
        packed |= codes[place::group] << np.uint8(place * bits)
    return packed


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo `pack_codes`: the first `count` codes, uint8.

    Example:
        >>> import numpy as np
        >>> unpack_codes(pack_codes(np.uint8([1, 0, 1]), bits=1), bits=1, count=3)
        array([1, 0, 1], dtype=uint8)
    """
    if bits == 8:
        return packed
    group = 8 // bits
    codes = np.empty((packed.size, group), np.uint8)
    for place in range(group):
        codes[:, place] = (packed >> np.uint8(place * bits)) & np.uint8(2**bits - 1)
    return codes.reshape(-1)[:count]
