"""Labels against an exhaustive search for the nearest point, and the hand-calculated example."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.codec import Codec
from fdl.comm.stages.base import ArraySpec, CodecContext
from fdl.comm.stages.entropy import Deflate
from fdl.comm.stages.labels import ArgmaxCodec, Simplex
from fdl.comm.stages.quantize import Quantize
from fdl.errors import RejectedMessageError, UserError
from fdl.state.float_formats import BFLOAT16, narrow
from tests.comm.strategies import as_float64, same


def through(stage, p):
    spec = ArraySpec(p.dtype, p.shape)
    coded = stage.encode(p, CodecContext())
    assert [ArraySpec(coded.main.dtype, coded.main.shape)] == list(stage.layout(spec, coded.variant))
    back = stage.decode(spec, coded, CodecContext())
    assert (back.dtype, back.shape) == (p.dtype, p.shape)
    return back, coded


def test_by_hand():
    back, _ = through(Simplex(2), np.tile([[0.5, 0.3, 0.2]], (4, 1)))
    assert np.allclose(back, 1 / 3)  # 1.5, 0.9 and 0.6 units: two units are left, for the remainders 0.9 and 0.6
    back, coded = through(ArgmaxCodec(), np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0, 0, 1]], np.float32))
    assert coded.main.tolist() == [1, 0, 2]
    assert back.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.sampled_from([2, 1]), st.integers(0, 2**32))
def test_no_point_of_the_simplex_grid_is_nearer(classes, bits, seed):
    units = 2**bits - 1
    grid = np.array([q for q in product(range(units + 1), repeat=classes) if sum(q) == units]) / units
    p = np.random.default_rng(seed).dirichlet(np.ones(classes), 9)
    back, _ = through(Simplex(bits), p)
    assert (np.rint(back * units).sum(axis=1) == units).all()
    least = np.abs(p[:, None] - grid).sum(axis=2).min(axis=1)
    assert np.allclose(np.abs(p - back).sum(axis=1), least, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_no_probability_moves_by_a_unit(bits, dtype):
    p = np.random.default_rng(0).dirichlet(np.full(11, 0.3), 200)
    p = narrow(p.astype(np.float32), BFLOAT16) if dtype == "bfloat16" else p.astype(dtype)
    unit = 1 / (2**bits - 1)
    back = as_float64(through(Simplex(bits), p)[0])
    assert np.abs(back - as_float64(p)).max() < unit * 1.01 + 0.01
    assert np.allclose(back.sum(axis=1), 1, atol=0.05)
    assert (back >= 0).all()


def test_one_bit_is_one_hot():
    p = np.random.default_rng(0).dirichlet(np.full(7, 0.3), 100).astype(np.float32)
    assert same(through(Simplex(1), p)[0], through(ArgmaxCodec(), p)[0])
    assert through(ArgmaxCodec(), p)[1].main.nbytes == 100
    many = np.random.default_rng(0).dirichlet(np.full(300, 0.3), 5).astype(np.float32)
    assert through(ArgmaxCodec(), many)[1].main.dtype == np.uint16


def test_what_is_no_probability_is_left_alone():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), 20).astype(np.float32)
    others = {
        "logits": rng.normal(size=(20, 5)).astype(np.float32),
        "negative": p - np.float32(0.3) * (np.arange(5) == 0) + np.float32(0.3) * (np.arange(5) == 1),
        "nan": np.where(np.arange(100).reshape(20, 5) == 7, np.nan, p),
        "vector": p[:, 0].copy(),
        "cube": p.reshape(4, 5, 5),
        "one column": np.ones((20, 1), np.float32),
    }
    for stage in (ArgmaxCodec(), Simplex(2)):
        codec = Codec([stage, Deflate()])
        back = codec.decode(codec.encode({"p": p, **others}), 1 << 20)
        assert all(same(back[name], array) for name, array in others.items())
        assert not same(back["p"], p)
        assert codec.last_report[0].bytes_in - codec.last_report[0].bytes_out > 300


def test_hostile_labels():
    p = np.random.default_rng(0).dirichlet(np.ones(5), 20).astype(np.float32)
    spec = ArraySpec(p.dtype, p.shape)
    for stage, reason in ((ArgmaxCodec(), "class 255 of 5"), (Simplex(4), "does not sum to 1")):
        coded = stage.encode(p, CodecContext())
        with pytest.raises(RejectedMessageError, match=reason):
            stage.decode(spec, coded._replace(main=np.full_like(coded.main, 255)), CodecContext())
        with pytest.raises(RejectedMessageError, match="no variant 2"):
            stage.layout(spec, 2)
    with pytest.raises(UserError, match="bits must be 8, 4, 2 or 1, got 3"):
        Simplex(3)
    assert [s.name for s in Codec([ArgmaxCodec(), Quantize(8)]).stages] == ["one_hot", "quantize"]
