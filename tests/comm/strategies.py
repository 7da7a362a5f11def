"""What the property tests draw: arrays of every dtype and shape, and every chain of stages."""

import tracemalloc
from contextlib import contextmanager

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fdl.comm.codec import Codec
from fdl.comm.stages.cast import BFloat16, Float16
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import BestOf, Deflate, Zstd
from fdl.comm.stages.labels import ArgmaxCodec, Simplex
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.range_coder import AnsCoder
from fdl.comm.stages.row_cache import Cache
from fdl.comm.stages.sparsify import RandomK, TopK
from fdl.state.float_formats import BFLOAT16

LOSSLESS = [
    Codec(),
    *(Codec([entropy]) for entropy in (Deflate(), Zstd(), AnsCoder(), BestOf([Deflate(), AnsCoder()]))),
]
NARROWING = [
    Float16(),
    BFloat16(),
    *(Quantize(bits, rounding) for bits in (8, 4, 2, 1) for rounding in ("nearest", "stochastic")),
    Quantize(8, granularity="tensor"),
]
LOSSY = [Codec([stage, *entropy]) for stage in NARROWING for entropy in ([], [Deflate()], [Zstd()])]
FURTHER = [
    Codec([Quantize(8), AnsCoder()]),
    Codec([Delta(), BestOf([Deflate(), AnsCoder(), Zstd()])]),
    Codec([Delta(), TopK(0.3), Quantize(4, "stochastic"), Deflate()]),
    Codec([Cache(0.01, 3), Quantize(8), AnsCoder()]),
    Codec([TopK(0.2, error_feedback=True)]),
    Codec([RandomK(0.3, unbiased=True), Float16(), Deflate()]),
    Codec([RandomK(0.3, error_feedback=True), Quantize(2)]),
    Codec([ArgmaxCodec(), Delta(), AnsCoder()]),
    Codec([Simplex(4), Delta(), Zstd()]),
]
CHAINS = LOSSLESS + LOSSY + FURTHER

INTEGERS = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "float32", "float64"]

shapes = st.one_of(
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    st.tuples(st.integers(1, 12), st.integers(1, 40)),
    st.tuples(st.integers(9, 300)),
)


@st.composite
def float_arrays(draw, shape=shapes, largest=1e30):
    """Finite real numbers of float16, bfloat16, float32 or float64: bell-shaped, or wild but below `largest`."""
    dtype = draw(st.sampled_from([*FLOATS, "bfloat16"]))
    shape = draw(shape)
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        offset = draw(st.sampled_from([0.0, 0.1, 1000.0]))
        values = rng.normal(offset, draw(st.sampled_from([0.0, 1e-6, 0.05, 3.0])), shape)
    else:
        bound = min(largest, 6e4 if dtype == "float16" else largest)
        values = draw(hnp.arrays(np.float64, shape, elements=st.floats(-bound, bound)))
    values = np.asarray(values)
    if dtype != "bfloat16":
        return values.astype(dtype)
    # cut, not rounded, so that this does not lean on the code under test
    return np.asarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)).view(BFLOAT16)


@st.composite
def integer_arrays(draw):
    return draw(hnp.arrays(draw(st.sampled_from(INTEGERS)), shapes))


def as_float64(array):
    """The numbers of any floating array, bfloat16 by the definition of its bits."""
    if array.dtype == BFLOAT16:
        return np.asarray((array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)).astype(np.float64)
    return array.astype(np.float64)


fields = st.dictionaries(st.text(max_size=12), st.one_of(float_arrays(), integer_arrays()), max_size=5)


def same(a, b):
    """Equal to the last bit, NaN payloads included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@contextmanager
def allocates_at_most(nbytes):
    """Fail when the block holds more of Python's memory than this at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= nbytes
