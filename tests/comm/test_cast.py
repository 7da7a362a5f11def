"""Half-width formats against torch's own conversions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fdl.comm.stages.base import ArraySpec, CodecContext
from fdl.comm.stages.cast import BFloat16, Float16
from fdl.state.float_formats import BFLOAT16, is_float_dtype, narrow, widen

BITS = hnp.arrays(np.uint32, st.integers(1, 50), elements=st.integers(0, 2**32 - 1))


def to_torch(array):
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


@settings(max_examples=200, deadline=None)
@given(BITS)
def test_bfloat16_of_any_float32_is_torchs_but_for_saturation(bits):
    values = bits.view(np.float32)
    got = to_torch(narrow(values, BFLOAT16)).float()
    want = torch.from_numpy(values).to(torch.bfloat16).float()
    saturated = torch.isinf(want) & torch.from_numpy(np.isfinite(values))
    assert torch.equal(got.isnan(), want.isnan())
    kept = ~saturated & ~want.isnan()
    assert torch.equal(got[kept], want[kept])
    assert (got[saturated] == torch.finfo(torch.bfloat16).max * want[saturated].sign()).all()


def test_bfloat16_by_hand():
    largest = np.uint32(0x7F7F0000).view(np.float32)
    values = np.array(
        [1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45],
        np.float32,
    )
    #                one, exact, half to even down, half to even up, above half, …, saturated twice, subnormal to 0
    want = [1.0, -2.5, 1.0, 1 + 2**-6, 1 + 2**-7, 0.0, -0.0, np.inf, -np.inf, largest, -largest, 0.0]
    got = widen(narrow(values, BFLOAT16))
    assert np.array_equal(got.view(np.uint32), np.array(want, np.float32).view(np.uint32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 0xFF800001])
def test_every_nan_stays_nan_with_its_sign(bits):
    value = np.array([bits], np.uint32).view(np.float32)
    half = narrow(value, BFLOAT16)
    assert np.isnan(widen(half)).all()
    assert half.view(np.uint16)[0] >> 15 == bits >> 31
    for other in (np.float16, np.float64):
        assert np.isnan(narrow(value, np.dtype(other))).all()


def test_bfloat16_widens_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = widen(bits.view(BFLOAT16)).view(np.uint32)
    assert np.array_equal(got, bits.astype(np.uint32) << 16)


def test_float16_saturates_finite_values_only():
    values = np.array([65519.0, 65520.0, -1e30, np.inf, -np.inf, np.nan, 1 / 3])
    got = narrow(values, np.dtype(np.float16))
    want = np.array([65504.0, 65504.0, -65504.0, np.inf, -np.inf, np.nan, 0.33325195], np.float16)
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stage, precision", [(Float16(), 2**-11), (BFloat16(), 2**-8)])
def test_cast_error_is_as_documented(stage, precision, dtype):
    x = np.random.default_rng(0).normal(0, 10, (50, 7)).astype(dtype)
    coded = stage.encode(x, CodecContext())
    spec = ArraySpec(x.dtype, x.shape)
    assert (ArraySpec(coded.main.dtype, coded.main.shape),) == stage.layout(spec, coded.variant)
    back = stage.decode(spec, coded, CodecContext())
    assert back.dtype == x.dtype
    assert coded.main.itemsize == 2
    assert (np.abs(back - x) <= precision * np.abs(x) + 1e-7).all()
    assert np.abs(back - x).max() > 0


def test_is_float():
    assert all(is_float_dtype(np.dtype(d)) for d in (np.float16, np.float32, np.float64, BFLOAT16))
    assert not any(is_float_dtype(np.dtype(d)) for d in (np.uint16, np.int64, np.bool_, np.complex64))
