"""Codes by hand, the declared error bound, unbiasedness, and rows that are hard to scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.stages.base import ArraySpec, CodecContext
from fdl.comm.stages.quantize import Quantize, _outwards
from fdl.errors import RejectedMessageError, UserError
from tests.comm.strategies import as_float64, float_arrays

BITS = [8, 4, 2, 1]
HALF, FULL = 1, 2


def through(stage, x, rng=None):
    """Encode, check that the parts are as announced, decode."""
    spec = ArraySpec(x.dtype, x.shape)
    before = x.tobytes()
    coded = stage.encode(x, CodecContext(rng))
    assert x.tobytes() == before
    parts = (coded.main, *coded.sides)
    assert [ArraySpec(part.dtype, part.shape) for part in parts] == list(stage.layout(spec, coded.variant))
    back = stage.decode(spec, coded, CodecContext())
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    return back, coded


def test_codes_and_packing_by_hand():
    def codes(stage, values):
        return through(stage, np.array([values], np.float32))[1].main.tolist()

    assert codes(Quantize(8), [0, 1, 2, 254, 255, 127.4, 127.6, 3, 4]) == [0, 1, 2, 254, 255, 127, 128, 3, 4]
    # first code in the lowest bits: (0, 1), (2, 15), (14, 7), (3, -)
    assert codes(Quantize(4), [0, 1, 2, 15, 14, 7, 3]) == [0x10, 0xF2, 0x7E, 0x03]
    # 0 1 2 3 → 0b11100100; 3 3 0 0 → 0b00001111; 1 → 0b01
    assert codes(Quantize(2), [0, 1, 2, 3, 3, 3, 0, 0, 1]) == [0b11100100, 0b00001111, 0b01]
    # above the middle of −1 … 3, which is 1
    assert codes(Quantize(1), [-1, 3, 0, 1, 1.5, 2, 0, 0, 3]) == [0b00110010, 0b1]


def test_ends_by_hand():
    x = np.array([[0.0, 10.0, 5.0, 2.5], [-1.0, -1.0, -1.0, -1.0], [0.25, 0.5, 0.75, 1.0]], np.float32)
    back, coded = through(Quantize(2), x)
    assert coded.variant == HALF + 2 * BITS.index(2)
    assert coded.sides[0].tolist() == [[0.0, -1.0, 0.25], [10.0, -1.0, 1.0]]
    step = np.float32(10 / 3)
    # 5.0 lies on the border of codes 1 and 2, which goes up; 2.5 is 0.75 steps, code 1
    assert np.allclose(back, [[0, 10, 2 * step, step], [-1] * 4, [0.25, 0.5, 0.75, 1.0]])


def test_one_bit_sends_the_means_of_the_halves():
    x = np.array([[1.0, 2.0, 3.0, 9.0, 11.0, 0.0, 0.0, 0.0, 10.0]], np.float32)
    back, _ = through(Quantize(1), x)
    assert back.tolist() == [[1, 1, 1, 10, 10, 1, 1, 1, 10]]
    bell = np.random.default_rng(0).standard_normal((100, 500)).astype(np.float32)
    error = ((through(Quantize(1), bell)[0] - bell) ** 2).mean()
    # The best one-bit quantiser of a normal variable leaves 1 - 2/pi; splitting at mid-range comes near it, while the
    # ends themselves would leave more than the variance.
    assert 1 - 2 / np.pi < error < 0.42
    assert np.allclose(through(Quantize(1), bell)[0].mean(axis=1), bell.mean(axis=1), atol=2e-3)


@pytest.mark.parametrize(
    "shape, granularity, rows",
    [
        ((400, 10), "row", 400),
        ((100,), "row", 1),
        ((64, 3, 3, 3), "row", 64),
        ((64, 32, 3, 3), "row", 64),
        ((8, 197, 384), "row", 8 * 197),
        ((8, 5, 4), "row", 8),
        ((400, 10), "tensor", 1),
    ],
)
def test_rows(shape, granularity, rows):
    stage = Quantize(8, granularity=granularity)
    _, ends = stage.layout(ArraySpec(np.dtype(np.float32), shape), HALF)
    assert ends.shape == (2, rows)
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    back, coded = through(stage, x)
    flat = x.reshape(rows, -1)
    assert np.allclose(coded.sides[0], [flat.min(axis=1), flat.max(axis=1)], rtol=1e-3, atol=1e-6)
    assert np.abs(back - x).max() <= 1 / 255


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=40, deadline=None)
@given(x=float_arrays(st.one_of(st.tuples(st.integers(1, 6), st.integers(2, 40)), st.tuples(st.integers(9, 80)))))
def test_no_value_moves_by_more_than_declared(x, bits, rounding):
    back, _ = through(Quantize(bits, rounding), x, np.random.default_rng(0))
    rows = as_float64(x).reshape(-1, x.shape[-1])
    error = np.abs(as_float64(back).reshape(rows.shape) - rows)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    bound = step / 2 if rounding == "nearest" else step
    # a result is rounded to the array's format: one unit in the last place of the larger end, at most
    unit = {8: 2.0**-52, 4: 2.0**-23}.get(x.dtype.itemsize, 2.0**-7 if x.dtype.names else 2.0**-10)
    smallest = {8: 1e-300, 4: 1e-44}.get(x.dtype.itemsize, 1e-40 if x.dtype.names else 6e-8)
    assert (error <= bound * (1 + 1 / 64 + 1e-4) + unit * np.maximum(np.abs(low), np.abs(high)) + smallest).all()


@pytest.mark.parametrize("bits", BITS)
def test_bound_is_tight_for_the_step_that_is_sent(bits):
    """Against the ends as sent, without the 1/64 of their rounding."""
    x = np.random.default_rng(1).normal(0, 1, (200, 64)).astype(np.float32)
    for rounding, part in (("nearest", 0.5), ("stochastic", 1.0)):
        if bits == 1 and rounding == "nearest":
            continue  # sends means, not ends
        back, coded = through(Quantize(bits, rounding), x, np.random.default_rng(0))
        lo, hi = coded.sides[0].astype(np.float64)
        assert (lo <= x.min(axis=1)).all()
        assert (hi >= x.max(axis=1)).all()
        moved = np.abs(back - x) / ((hi - lo) / (2**bits - 1))[:, None]
        assert 0.9 * part < moved.max() <= part * (1 + 1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_unbiased_with_the_variance_of_the_formula(bits):
    row = np.sort(np.random.default_rng(2).normal(0, 1, 17)).astype(np.float32)
    draws = 4000
    back, coded = through(Quantize(bits, "stochastic"), np.tile(row, (draws, 1)), np.random.default_rng(3))
    lo, hi = coded.sides[0][:, 0].astype(np.float64)
    step = (hi - lo) / (2**bits - 1)
    part = ((row - lo) / step) % 1
    variance = part * (1 - part) * step**2
    standard_error = np.sqrt(variance / draws)
    assert (np.abs(back.mean(axis=0, dtype=np.float64) - row) <= 4.5 * standard_error + 1e-6).all()
    busy = (part > 0.05) & (part < 0.95)
    assert busy.sum() >= 5
    assert np.allclose(back.var(axis=0, dtype=np.float64)[busy], variance[busy], rtol=0.2)
    assert (variance <= step**2 / 4 + 1e-12).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_noise_does_not_lift_the_row_s_end(bits):
    class Largest:
        bit_generator = property(lambda self: self)

        def random_raw(self, size):
            return np.full(size, 2**64 - 1, np.uint64)

    x = np.array([np.linspace(0, 2**bits - 1, 20)], np.float32)
    back, _ = through(Quantize(bits, "stochastic"), x, Largest())
    assert back[0, -1] == x[0, -1]


def test_bits_follow_the_schedule_and_a_message_tells_them():
    x = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    stage, spec = Quantize(2, schedule=[(3, 8), (5, 1)]), ArraySpec(x.dtype, x.shape)
    assert [stage.bits_in(round) for round in range(7)] == [2, 2, 2, 8, 8, 1, 1]
    for round, bits in enumerate([2, 2, 2, 8, 8, 1, 1]):
        coded = stage.encode(x, CodecContext(round=round))
        plain = Quantize(bits).encode(x, CodecContext())
        assert coded.main.size == 600 * bits // 8
        assert np.array_equal(coded.main, plain.main)
        # no receiver needs the schedule, nor the round
        assert np.array_equal(
            Quantize(4).decode(spec, coded, CodecContext()), Quantize(bits).decode(spec, plain, CodecContext())
        )
    assert str(stage) == "quantize/2,3:8,5:1/row"
    assert stage.signature == Quantize(8).signature
    for schedule, message in (([(1, 3)], "8, 4, 2 or 1 bits"), ([(4, 8), (2, 4)], "order"), ([(2, 8), (2, 4)], "once")):
        with pytest.raises(UserError, match=f"schedule must .*{message}"):
            Quantize(8, schedule=schedule)


def test_stochastic_rounding_repeats_with_its_stream():
    x = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    stage = Quantize(2, "stochastic")
    first, second, other = (stage.encode(x, CodecContext(np.random.default_rng(seed))).main for seed in (7, 7, 8))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert stage.draws()
    assert not Quantize(2).draws()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1 / 3, 0.1, 1e-8, 60000.1, -1e37, 1e-45])
def test_constant_rows_come_back_exactly(value, rounding, bits, dtype):
    if dtype == "float16" and abs(value) > 6e4:
        value = 60000.0
    x = np.full((3, 20), value, dtype)
    x[1] = np.linspace(0, 1, 20)
    back, _ = through(Quantize(bits, rounding), x, np.random.default_rng(0))
    assert np.array_equal(back[0], x[0])
    assert np.array_equal(back[2], x[2])


@pytest.mark.parametrize(
    "low, high, variant",
    [(-4.0, 9.0, HALF), (1e-4, 0.99, HALF), (-1e-3, 1e-3, HALF), (1000.0, 1000.01, FULL), (0.0, 1e6, FULL),
     (-1e-7, 2e-7, FULL), (-3e38, 3e38, FULL), (0.0, 65519.0, FULL)],
)  # fmt: skip
@pytest.mark.parametrize("bits", BITS)
def test_scales_are_half_precision_where_that_is_harmless(low, high, variant, bits):
    x = np.array([np.linspace(low, high, 33)] * 2, np.float32)
    back, coded = through(Quantize(bits), x)
    if bits > 1:
        assert coded.variant == variant + 2 * BITS.index(bits)
    step = (np.float64(x.max()) - x.min()) / (2**bits - 1)
    assert np.isfinite(back).all()
    assert np.abs(back.astype(np.float64) - x).max() <= step / 2 * (1 + 1 / 64) + np.spacing(np.float32(high))


def test_half_precision_ends_go_outwards_at_every_magnitude():
    rng = np.random.default_rng(0)
    low = rng.choice([-1, 1], 4000) * 10.0 ** rng.uniform(-9, 4, 4000)
    ends = np.stack([low, low + np.abs(low)])
    ends[:, :6] = [[0, -0.0, 2**-14, -(2**-14), 2**-24, 1e-30], [0, 0, 2**-14, 0, 2**-24, 2e-30]]
    rounded = _outwards(ends, np.float16)
    assert (rounded[0] <= ends[0]).all()
    assert (rounded[1] >= ends[1]).all()
    inwards = np.nextafter(rounded, np.array([[np.inf], [-np.inf]], np.float16))
    exact = rounded == ends
    assert (exact[0] | (inwards[0] > ends[0])).all()  # the nearest such number
    assert (exact[1] | (inwards[1] < ends[1])).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_spoils_its_row_only(bits, rounding, value):
    x = np.random.default_rng(0).random((3, 20), dtype=np.float32)
    x[1, 4] = value
    back, _ = through(Quantize(bits, rounding), x, np.random.default_rng(0))
    assert not np.isfinite(back[1]).all()
    assert np.isfinite(back[[0, 2]]).all()


def test_bad_arguments_and_variants():
    with pytest.raises(UserError, match="bits must be 8, 4, 2 or 1, got 3"):
        Quantize(3)
    with pytest.raises(UserError, match="bits must be"):
        Quantize(True)
    with pytest.raises(UserError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        Quantize(8, "up")
    with pytest.raises(UserError, match="granularity must be"):
        Quantize(8, granularity="column")
    with pytest.raises(RejectedMessageError, match="quantize has no variant 9"):
        Quantize(8).layout(ArraySpec(np.dtype(np.float32), (4, 4)), 9)
