"""Chains that remember: what they save, how exact they are, and that both ends stay in step."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.codec import Codec
from fdl.comm.link_state import LinkState
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import BestOf, Deflate
from fdl.comm.stages.labels import ArgmaxCodec, Simplex
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.range_coder import AnsCoder
from fdl.comm.stages.row_cache import Cache
from fdl.comm.stages.sparsify import RandomK, TopK
from fdl.errors import RejectedMessageError, UserError
from fdl.state import checkpoint
from fdl.state.float_formats import BFLOAT16, narrow
from tests.comm.strategies import allocates_at_most, same

LIMIT = 1 << 20
CHAINS = [
    [Delta()],
    [Delta(), Quantize(4), AnsCoder()],
    [Delta(), TopK(0.1), Quantize(8, "stochastic"), Deflate()],
    [Delta(), RandomK(0.3), Deflate()],
    [Cache(0.01, 3), Quantize(8), Deflate()],
    [Cache(0, 2)],
    [TopK(0.2, error_feedback=True), Quantize(8)],
    [ArgmaxCodec(), Delta(), BestOf([Deflate(), AnsCoder()])],
    [Simplex(2), Delta()],
]
IDS = [repr(Codec(stages)) for stages in CHAINS]


class Ends:
    """A sender and a receiver, each with a memory of its own."""

    def __init__(self, stages, seed=0):
        self.codec, self.seed = Codec(stages), seed
        self.sender, self.receiver = LinkState(), LinkState()

    def send(self, round, lost=False, **fields):
        self.sender.begin()
        data = self.codec.encode(fields, np.random.default_rng([self.seed, round]), round, self.sender)
        own = self.codec.decode(data, LIMIT, round, self.sender)
        if lost:
            return None, data
        self.receiver.begin()
        back = self.codec.decode(data, LIMIT, round, self.receiver)
        self.sender.commit()
        self.receiver.commit()
        assert all(same(own[name], back[name]) for name in fields)
        return back, data


def drift(rng, rounds, shape=(40, 6), change=0.1):
    """Probabilities of which some rows change from round to round."""
    p = rng.dirichlet(np.ones(shape[1]) * 0.3, shape[0]).astype(np.float32)
    for _ in range(rounds):
        rows = rng.random(shape[0]) < change
        p = np.where(rows[:, None], rng.dirichlet(np.ones(shape[1]) * 0.3, shape[0]), p).astype(np.float32)
        yield p


@pytest.mark.parametrize("stages", CHAINS, ids=IDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), losses=st.lists(st.booleans(), min_size=6, max_size=6))
def test_both_ends_stay_in_step_whatever_is_lost(stages, seed, losses):
    """A memory saved and restored in the middle, and one that never met the lost messages, give the same bytes."""
    rng = np.random.default_rng(seed)
    ends, resumed, spared = Ends(stages, seed), Ends(stages, seed), Ends(stages, seed)
    for round, (p, lost) in enumerate(zip(drift(rng, 6), losses), 1):
        features = rng.normal(size=(9, 12)).astype(np.float64)
        back, data = ends.send(round, lost, values=p, features=features)
        for end in ("sender", "receiver"):
            state = checkpoint.from_bytes(checkpoint.to_bytes({"memory": getattr(resumed, end).state_dict()}))["memory"]
            setattr(resumed, end, LinkState())
            getattr(resumed, end).load_state_dict(state)
        assert resumed.send(round, lost, values=p, features=features)[1] == data
        if not lost:
            again, same_data = spared.send(round, values=p, features=features)
            assert same_data == data
            assert all(same(again[name], back[name]) for name in back)


@pytest.mark.parametrize("stages", CHAINS, ids=IDS)
def test_a_receiver_that_missed_a_message_says_so_or_needs_none(stages):
    ends = Ends(stages)
    rounds = list(drift(np.random.default_rng(0), 3))
    ends.send(1, values=rounds[0])
    missed = ends.codec.encode({"values": rounds[1]}, np.random.default_rng(0), 2, ends.sender)
    ends.codec.decode(missed, LIMIT, 2, ends.sender)
    ends.sender.commit()
    ends.sender.begin()
    data = ends.codec.encode({"values": rounds[2]}, np.random.default_rng(0), 3, ends.sender)
    if isinstance(stages[0], TopK):  # only the sender remembers
        assert ends.codec.decode(data, LIMIT, 3, ends.receiver)["values"].shape == (40, 6)
        return
    with pytest.raises(RejectedMessageError, match="message number 2, but number 1 is the last that was accepted"):
        ends.codec.decode(data, LIMIT, 3, ends.receiver)
    with pytest.raises(RejectedMessageError, match="message number 2, but none was accepted yet"):
        ends.codec.decode(data, LIMIT, 3, LinkState())


@pytest.mark.parametrize("stages", CHAINS, ids=IDS)
@pytest.mark.filterwarnings("error")
def test_hostile_bytes_never_crash_nor_change_what_is_kept(stages):
    rng, ends = np.random.default_rng(2), Ends(stages)
    rounds = list(drift(rng, 3))
    for round in (1, 2):
        ends.send(round, values=rounds[round - 1], rows=np.arange(40, dtype=np.uint8))
    good = ends.codec.encode({"values": rounds[2], "rows": np.arange(40, dtype=np.uint8)}, rng, 3, ends.sender)
    kept = checkpoint.to_bytes(ends.receiver.state_dict())
    for _ in range(250):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            start = rng.integers(2, len(data))
            data[start : start + rng.integers(0, 3)] = rng.bytes(rng.integers(0, 3))
        ends.receiver.begin()
        try:
            with allocates_at_most(2_000_000):
                back = ends.codec.decode(bytes(data), 10_000, 3, ends.receiver)
        except RejectedMessageError:
            continue
        assert sum(array.nbytes for array in back.values()) <= 10_000
    for end in range(len(good)):
        with pytest.raises(RejectedMessageError):
            ends.codec.decode(good[:end], LIMIT, 3, ends.receiver)
    assert checkpoint.to_bytes(ends.receiver.state_dict()) == kept


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_delta_is_exact_but_for_rounding(dtype):
    rng, ends = np.random.default_rng(0), Ends([Delta()])
    x = rng.normal(size=(30, 5))
    for round in range(1, 8):
        x = x + 0.01 * rng.normal(size=x.shape)
        array = narrow(x.astype(np.float32), BFLOAT16) if dtype == "bfloat16" else x.astype(dtype)
        back, _ = ends.send(round, x=array)
        wide = narrow(back["x"], np.dtype(np.float32)) if dtype == "float64" else back["x"]
        exact = np.float64(x)
        units = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-22, "float64": 2**-22}[dtype]
        got = (wide.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else wide
        assert np.abs(got.astype(np.float64) - exact).max() <= units * 4


def test_delta_errors_do_not_add_up_and_shrink_when_nothing_changes():
    x, ends = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32), Ends([Delta(), Quantize(4)])
    errors = [np.abs(ends.send(round, x=x)[0]["x"] - x).max() for round in range(1, 6)]
    # every round quantises what the last one lost: range / 15 / 2 of it at most
    assert all(b <= a * 2 / 15 / 2 * 1.1 + 1e-6 for a, b in pairwise(errors))
    assert errors[-1] < 1e-4
    rng, ends = np.random.default_rng(1), Ends([Delta(), Quantize(4)])
    for round in range(1, 40):
        x = x + 0.01 * rng.normal(size=x.shape).astype(np.float32)
        error = np.abs(ends.send(round, x=x)[0]["x"] - x).max()
    assert error <= 0.1 * 8 / 15 / 2 * 1.1


def test_delta_within_its_tolerance_sends_zeros():
    rng, ends = np.random.default_rng(0), Ends([Delta(tolerance=0.01), Quantize(8), Deflate()])
    x = rng.random((200, 20)).astype(np.float32)
    sizes = []
    for round in range(1, 6):
        back, data = ends.send(round, x=x)
        assert np.abs(back["x"] - x).max() <= 0.011
        sizes.append(len(data))
        x = x + np.float32(0.001)
        x[round] = rng.random(20)
    # nearly all codes are equal: less than a bit and a half each, with the ends of the rows
    assert max(sizes[1:]) < 200 * 20 / 8 * 1.5 < sizes[0] / 4


def test_nothing_is_left_out_of_what_delta_sends_whole():
    ends, x = Ends([Delta(), TopK(0.1)]), np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
    assert same(ends.send(1, x=x)[0]["x"], x)
    back = ends.send(2, x=x + 0.1)[0]["x"]
    assert (back != x).sum() == 20
    assert same(ends.send(3, x=x[:10])[0]["x"], x[:10])
    missing = [np.abs(ends.send(round, x=x[:10] + 0.1)[0]["x"] - x[:10] - 0.1).max() for round in range(4, 15)]
    assert missing[-1] < 1e-6 < missing[0]


def test_delta_never_makes_a_probability_negative():
    rng, ends = np.random.default_rng(0), Ends([Delta(), Quantize(1)])
    for round, p in enumerate(drift(rng, 6, change=0.5), 1):
        assert ends.send(round, x=p)[0]["x"].min() >= 0
    assert ends.send(9, x=p - 1)[0]["x"].min() < 0


def test_delta_of_labels_sends_only_changes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 5000).astype(np.uint8)
    ends = Ends([Delta()])
    _, first = ends.send(1, y=labels)
    changed = labels.copy()
    changed[[7, 300, 4999]] = [10, 11, 12]
    back, second = ends.send(2, y=changed)
    assert same(back["y"], changed)
    assert len(first) > 5000
    # changed values, their distances in 1 + 2 + 2 bytes, the number of the message
    assert ends.codec.last_report[0].bytes_out == 3 + 5 + 4
    assert len(second) < 35
    unchanged, third = ends.send(3, y=changed)
    assert same(unchanged["y"], changed)
    assert len(third) < 25
    shuffled, _ = ends.send(4, y=rng.permutation(changed))
    assert ends.codec.last_report[0].bytes_out == 5000  # whole, where that is shorter
    assert shuffled["y"].sum() == changed.sum()


def test_delta_goes_whole_without_a_like_message_before():
    ends = Ends([Delta()])
    x = np.arange(40, dtype=np.float32) + 100
    for round, (array, whole) in enumerate(
        [
            (x, True),
            (x + 1, False),
            (x[:20], True),
            (x[:20].astype(np.float64), True),
            (-x[:20].astype(np.float64), True),
        ],
        1,
    ):
        back, _ = ends.send(round, x=array)
        assert same(back["x"], array)
        assert ends.codec.last_report[0].bytes_out - array.nbytes == (0 if whole else 4)
    flags = np.random.default_rng(0).random(100) < 0.5
    assert same(ends.send(7, x=flags)[0]["x"], flags)


def test_a_field_that_is_not_sent_keeps_its_past():
    ends = Ends([Delta(), Quantize(8)])
    x, y = np.random.default_rng(0).random((2, 30, 20)).astype(np.float32)
    ends.send(1, x=x, y=y)
    ends.send(2, y=y)
    back, _ = ends.send(3, x=x)
    assert np.abs(back["x"] - x).max() < 1e-4  # what the first message lost is made good


def test_cache_sends_what_changed_until_it_expires():
    rng, ends = np.random.default_rng(0), Ends([Cache(0.05, expiry=3)])
    x = rng.random((100, 10)).astype(np.float32)
    moved = {2: [3], 3: [3, 50], 4: [], 5: [0, 99], 6: [], 7: []}
    # row 3 was sent in rounds 1, 2 and 3, row 50 in 1 and 3; the others of round 1 expire in round 4
    due = {2: 1, 3: 2, 4: 98, 5: 2, 6: 2, 7: 96}
    held, _ = ends.send(1, x=x)
    for round, rows in moved.items():
        x = x + rng.uniform(-0.001, 0.001, x.shape).astype(np.float32)
        x[rows] += 1
        back, _ = ends.send(round, x=x)
        assert ends.codec.last_report[0].bytes_out == due[round] * 40 + min(due[round], 13) + 4
        assert np.abs(back["x"] - x).max() <= 0.05
        assert same(back["x"][rows], x[rows])
    assert held["x"].shape == x.shape


def test_cache_knows_rows_by_their_names():
    rng, ends = np.random.default_rng(0), Ends([Cache(0.0, expiry=10)])
    answers = rng.random((1000, 10)).astype(np.float32)
    seen = set()
    for round in range(1, 7):
        rows = np.sort(rng.choice(1000, 300, replace=False)).astype(np.uint16)
        back, _ = ends.send(round, values=answers[rows], rows=rows)
        assert same(back["values"], answers[rows])
        new = len(set(rows.tolist()) - seen)
        sent = ends.codec.last_report[0].bytes_out - rows.nbytes
        assert new * 40 <= sent <= new * 40 + 300 // 8 + 1 + 4
        seen |= set(rows.tolist())
    twice = np.array([5, 5] + [7] * 298, np.uint16)
    back, _ = ends.send(9, values=answers[twice], rows=twice)  # rows that are not told apart go whole
    assert same(back["values"], answers[twice])


def test_what_a_hostile_sender_leaves_is_bounded():
    codec, memory = Codec([Delta()]), LinkState(limit=100_000)
    for i in range(100):
        memory.begin()
        data = codec.encode({f"x{i}": np.full(2000, i, np.float32)}, None, i, memory)
        codec.decode(data, 10_000, i, memory)
        memory.commit()
        kept = memory.state_dict()
        assert f"delta/x{i}" in kept
        assert len(kept) <= 13


def test_bad_arguments_and_chains():
    with pytest.raises(UserError, match="tolerance must be at least 0, got -1"):
        Cache(-1)
    with pytest.raises(UserError, match="tolerance must be at least 0, got nan"):
        Delta(float("nan"))
    with pytest.raises(UserError, match="expiry must be at least 1 round, got 0"):
        Cache(expiry=0)
    with pytest.raises(UserError, match="cache after one_hot"):
        Codec([ArgmaxCodec(), Cache()])
    with pytest.raises(UserError, match=r"stage 1 \(cache\) does the same work as stage 0 \(delta\)"):
        Codec([Delta(), Cache()])
    with pytest.raises(UserError, match=r"stage 1 \(delta\) must come before stage 0 \(quantize\)"):
        Codec([Quantize(8), Delta()])
    assert Codec([Delta()]).remembers
    assert not Codec([TopK(0.1), Quantize(8)]).remembers
