"""Sparsification: what is sent, its bound, unbiasedness, and errors that are made good."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.codec import Codec
from fdl.comm.link_state import LinkState
from fdl.comm.stages.base import ArraySpec, CodecContext, EncodedArray
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.sparsify import RandomK, TopK
from fdl.errors import RejectedMessageError, UserError

LIMIT = 1 << 20


def exchange(codec, array, round, memory, seed=0):
    """One message over a link that holds its memory for both ends."""
    memory.begin()
    data = codec.encode({"x": array}, np.random.default_rng([seed, round]), round, memory)
    back = codec.decode(data, LIMIT, round, memory)["x"]
    memory.commit()
    return back, data


def test_top_k_by_hand():
    x = np.array([0.1, -5, 0.2, 4, 0, 0, 0, 0.3, -0.4, 3], np.float32)
    stage, spec = TopK(0.25), ArraySpec(np.dtype(np.float32), (10,))
    coded = stage.encode(x, CodecContext())
    assert coded.main.tolist() == [-5, 4, 3]  # ⌈0.25 · 10⌉ of them, in their order
    assert coded.sides[0].tolist() == [0b00001010, 0b10]
    assert [ArraySpec(p.dtype, p.shape) for p in (coded.main, *coded.sides)] == list(
        stage.layout(spec, 2, coded.extents)
    )
    assert stage.decode(spec, coded, CodecContext()).tolist() == [0, -5, 0, 4, 0, 0, 0, 0, 0, 3]


@settings(max_examples=80, deadline=None)
@given(st.integers(9, 400), st.floats(0.001, 1), st.integers(0, 2**32), st.sampled_from(["f2", "f4", "f8"]))
def test_top_k_keeps_its_promise(count, share, seed, dtype):
    x = np.random.default_rng(seed).standard_t(2, count).clip(-1e4, 1e4).astype(dtype)
    codec = Codec([TopK(share)])
    back = codec.decode(codec.encode({"x": x}), LIMIT)["x"]
    k = int(np.ceil(share * count))
    assert ((back == x) | (back == 0)).all()
    assert (back != 0).sum() >= min(k, np.count_nonzero(x))
    wide = x.astype(np.float64)
    assert ((wide - back) ** 2).sum() <= (1 - k / count) * (wide**2).sum() * (1 + 1e-9)


def test_random_k_sends_a_seed_and_is_unbiased():
    x = np.random.default_rng(0).normal(0, 1, (20, 10)).astype(np.float32)
    codec, plain = Codec([RandomK(0.25, unbiased=True)]), Codec([RandomK(0.25)])
    data = codec.encode({"x": x}, np.random.default_rng(0))
    assert codec.last_report[0].bytes_out == 50 * 4 + 8
    back = codec.decode(data, LIMIT)["x"]
    sent = back != 0
    assert sent.sum() == 50
    assert np.allclose(back[sent], 4 * x[sent])
    unscaled = plain.decode(plain.encode({"x": x}, np.random.default_rng(0)), LIMIT)["x"]
    assert np.array_equal(unscaled, np.where(sent, x, 0))
    draws = 3000
    mean = sum(
        codec.decode(codec.encode({"x": x}, np.random.default_rng(i)), LIMIT)["x"].astype(np.float64)
        for i in range(draws)
    )
    # variance of one draw: (d/k − 1)·x²
    assert (np.abs(mean / draws - x) <= 4.5 * np.sqrt(3 * x.astype(np.float64) ** 2 / draws) + 1e-7).all()


def test_places_of_random_k_do_not_depend_on_numpys_version():
    stage, spec = RandomK(0.25), ArraySpec(np.dtype(np.float32), (16,))
    coded = EncodedArray(2, np.arange(1, 5, dtype=np.float32), (np.array([5], "<u8"),), (4,))
    assert np.flatnonzero(stage.decode(spec, coded, CodecContext())).tolist() == [4, 7, 8, 11]


STAGES = [
    [TopK(0.1, error_feedback=True)],
    [RandomK(0.1, error_feedback=True)],
    [TopK(0.2, error_feedback=True), Quantize(4)],
    [RandomK(0.2, error_feedback=True), Quantize(1, "stochastic")],
]


@pytest.mark.parametrize("stages", STAGES, ids=lambda s: repr(Codec(s)))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 8))
def test_error_feedback_telescopes(stages, seed, rounds):
    """Σ c + e = Σ g: exactly, where no sum is rounded."""
    rng, codec, memory = np.random.default_rng(seed), Codec(stages), LinkState()
    sent = wanted = np.zeros((9, 20), np.float32)
    for round in range(rounds):
        g = rng.integers(-100, 100, (9, 20)).astype(np.float32)
        sent = sent + exchange(codec, g, round, memory, seed)[0]
        wanted = wanted + g
    error = memory.state_dict()[f"{stages[0].name}/x"]["error"]
    error = np.frombuffer(error["data"].numpy().tobytes(), error["dtype"]).reshape(9, 20)
    if len(stages) == 1:
        assert np.array_equal(sent + error, wanted)
    else:
        assert np.allclose(sent + error, wanted, atol=1e-2)
    assert np.abs(error).max() > 0


def test_with_error_feedback_everything_arrives():
    codec, memory, g = Codec([TopK(0.1, error_feedback=True)]), LinkState(), np.linspace(1, 2, 100).astype(np.float32)
    total = sum(exchange(codec, g, round, memory)[0] for round in range(400))
    assert np.abs(total / 400 - g).max() < 0.06
    plain = Codec([TopK(0.1)])
    assert (plain.decode(plain.encode({"x": g}), LIMIT)["x"] == 0).sum() == 90  # the same 90 every time


def test_a_refused_message_leaves_the_error_as_it_was():
    codec, memory = Codec([TopK(0.1, error_feedback=True)]), LinkState()
    g = np.random.default_rng(0).normal(size=100).astype(np.float32)
    exchange(codec, g, 1, memory)
    before = memory.state_dict()["top_k/x"]["error"]["data"]
    memory.begin()
    lost = codec.encode({"x": g}, None, 2, memory)
    memory.begin()
    again = codec.encode({"x": g}, None, 2, memory)
    assert lost == again
    assert memory.state_dict()["top_k/x"]["error"]["data"].equal(before)


def test_chains_and_arguments_that_make_no_sense():
    for share in (0, -1, 1.5):
        with pytest.raises(UserError, match=r"fraction must be in \(0, 1\]"):
            TopK(share)
    with pytest.raises(UserError, match="unbiased cannot go with error_feedback"):
        RandomK(0.1, error_feedback=True, unbiased=True)
    with pytest.raises(UserError, match="top_k with error_feedback after delta counts what was not sent twice"):
        Codec([Delta(), TopK(0.1, error_feedback=True)])
    with pytest.raises(UserError, match="random_k with unbiased after delta overshoots"):
        Codec([Delta(), RandomK(0.1, unbiased=True)])
    with pytest.raises(UserError, match="does the same work"):
        Codec([TopK(), RandomK()])


@pytest.mark.parametrize(
    "stage, variant, extents",
    [
        (TopK(0.1), 2, (0, 0)),
        (TopK(0.1), 2, (101, 13)),
        (TopK(0.1), 2, (5, 4)),
        (TopK(0.1), 2, (5, 14)),
        (TopK(0.1), 1, (1, 0)),
        (TopK(0.1), 3, (5, 5)),
        (RandomK(0.1), 2, (0,)),
        (RandomK(0.1), 3, (101,)),
        (RandomK(0.1), 1, (4,)),
        (RandomK(0.1), 4, (4,)),
    ],
)
def test_hostile_layouts(stage, variant, extents):
    with pytest.raises(RejectedMessageError, match=stage.name):
        stage.layout(ArraySpec(np.dtype(np.float32), (100,)), variant, extents)
