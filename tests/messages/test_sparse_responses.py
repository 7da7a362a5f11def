"""Sparse answers to tokens: on the wire and back, how many bytes, and what is refused."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.codec import Codec
from fdl.comm.stages.quantize import Quantize
from fdl.comm.wire import pack as to_bytes
from fdl.comm.wire import unpack as from_bytes
from fdl.errors import RejectedMessageError
from fdl.messages import message_type
from fdl.messages.sparse_responses import SparseResponses, TokenLogWeights, pack_bits, unpack_bits
from tests.comm.strategies import CHAINS, LOSSLESS, allocates_at_most

LIMIT = 1 << 24


@st.composite
def messages(draw):
    """Any that a client could send: 0 … k ids a position, or as many at each."""
    vocab = draw(st.sampled_from([1, 2, 3, 256, 257, 50_257, 1 << 31]))
    shape = draw(st.tuples(st.integers(0, 4), st.integers(1, 6)))
    most = min(vocab, draw(st.integers(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = rng.integers(0, most + 1, shape) if draw(st.booleans()) else np.full(shape, most)
    chosen = [np.sort(_distinct(rng, vocab, size)) for size in sizes.flatten()]
    ids = torch.tensor(np.concatenate([np.zeros(0, int), *chosen]), dtype=torch.int32)
    sampled = draw(st.booleans())
    values = torch.from_numpy(rng.integers(1, 256, len(ids)).astype(np.uint8))
    logs = torch.from_numpy(-rng.exponential(3, len(ids)).astype(np.float32))
    weights = torch.from_numpy(rng.normal(0, draw(st.sampled_from([0.0, 1.0, 300.0])), shape)).cumsum(1)
    rows = torch.from_numpy(np.sort(rng.choice(1000, shape[0], replace=False)))
    return SparseResponses(
        ids,
        values if sampled else logs,
        torch.tensor(sizes, dtype=torch.int32),
        vocab,
        None if sampled else torch.from_numpy(-rng.exponential(3, shape).astype(np.float32)),
        TokenLogWeights.quantize(weights) if draw(st.booleans()) else None,
        rows if draw(st.booleans()) else None,
        draw(st.integers(0, 2**40)),
    )


def _distinct(rng, vocab, size):
    found = set()
    while len(found) < size:
        found.update(rng.integers(0, vocab, size - len(found)).tolist())
    return np.array(sorted(found), dtype=np.int64)


def crossed(message, codec):
    data = to_bytes(message, codec, client=3, round=2, rng=np.random.default_rng(0))
    return from_bytes(data, codec, limit=LIMIT, client=3, round=2), len(data)


def same_but_values(a, b):
    for name in ("ids", "sizes", "rows"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None) and (x is None or (x.dtype == y.dtype and torch.equal(x, y)))
    assert (a.vocab, a.samples, a.form) == (b.vocab, b.samples, b.form)
    assert (a.weights is None) == (b.weights is None)
    assert a.weights is None or torch.equal(a.weights.values(), b.weights.values())


@settings(max_examples=120, deadline=None)
@given(message=messages(), codec=st.sampled_from(LOSSLESS))
def test_every_message_crosses_a_lossless_chain_unchanged(message, codec):
    got, _ = crossed(message, codec)
    same_but_values(got, message)
    assert torch.equal(got.values, message.values)
    assert (got.tail is None) == (message.tail is None)
    assert got.tail is None or torch.equal(got.tail, message.tail)


@settings(max_examples=80, deadline=None)
@given(message=messages(), codec=st.sampled_from([c for c in CHAINS if not c.remembers]))
def test_any_chain_leaves_ids_and_counts_alone(message, codec):
    if "one_hot" in repr(codec) or "simplex" in repr(codec) or "_k" in repr(codec):
        return  # these choose among values, which is for other messages
    got, _ = crossed(message, codec)
    same_but_values(got, message)
    if message.form == "sampled":
        assert torch.equal(got.values, message.values)


@settings(max_examples=150, deadline=None)
@given(
    message=messages(),
    place=st.integers(0, 1 << 30),
    value=st.integers(0, 255),
    cut=st.integers(0, 40),
    data=st.data(),
)
def test_damaged_bytes_are_refused_or_make_a_valid_message(message, place, value, cut, data):
    """The codec and what is behind it, without the checksum that would find the damage first."""
    codec = data.draw(st.sampled_from(LOSSLESS))
    blob = bytearray(codec.encode(message.fields()))
    meta = dict(message.meta())
    blob[place % len(blob)] = value
    key = data.draw(st.sampled_from(sorted(meta)))
    if data.draw(st.booleans()):
        meta[key] = data.draw(st.integers(-(1 << 62), 1 << 62))
    with allocates_at_most(16 << 20), contextlib.suppress(RejectedMessageError):
        SparseResponses.build(codec.decode(bytes(blob[: len(blob) - cut]), 1 << 20), meta).validate()


def example(**changes):
    parts = {
        "ids": torch.tensor([0, 4, 7, 2, 1, 3], dtype=torch.int32),
        "values": torch.tensor([0.5, 0.2, 0.1, 0.9, 0.3, 0.6]).log(),
        "sizes": torch.tensor([[3, 1], [0, 2]], dtype=torch.int32),
        "vocab": 8,
        "tail": torch.tensor([[0.2, 0.1], [1.0, 0.1]]).log(),
        "weights": TokenLogWeights.quantize(torch.tensor([[0.0, -1.0], [2.0, 3.0]])),
        "rows": torch.tensor([4, 9]),
    }
    return SparseResponses(**(parts | changes))


def test_it_is_known_by_its_code():
    assert message_type(SparseResponses.code) is SparseResponses


def test_the_wire_holds_distances_in_few_bits():
    fields, meta = example().fields(), example().meta()
    # 0, 4 - 0 - 1, 7 - 4 - 1; 2; 1, 3 - 1 - 1
    assert unpack_bits(fields["ids"], meta["width"], 6).tolist() == [0, 3, 2, 2, 1, 1]
    assert meta["width"] == 2 and fields["ids"].nbytes == 2
    assert fields["sizes"].dtype == np.uint8 and fields["rows"].tolist() == [4, 9]


@pytest.mark.parametrize(("k", "vocab", "bits"), [(8, 256, 8), (16, 50_257, 16), (4, 151_936, 18)])
def test_bytes_of_a_token(k, vocab, bits):
    """k ids of at most ⌈log2 V⌉ bits, k + 1 values and a log-weight of 8 bits; sizes cost nothing where all are k."""
    n, length = 40, 64
    count, stratum = n * length, vocab // k
    ids = torch.arange(k) * stratum + torch.randint(stratum, (count, k))
    ids[7] = torch.arange(vocab - k, vocab)
    message = SparseResponses(
        ids.flatten().int(),
        -torch.rand(count * k),
        torch.full((n, length), k, dtype=torch.int32),
        vocab,
        -torch.rand(n, length),
        TokenLogWeights.quantize(torch.randn(n, length)),
    )
    _, size = crossed(message, Codec([Quantize(8)]))
    payload = math.ceil(count * k * bits / 8) + count * (k + 2)
    assert payload < size < payload + 200


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 31), count=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_numbers_are_packed_bit_by_bit(width, count, seed):
    values = np.random.default_rng(seed).integers(0, 1 << width, count)
    packed = pack_bits(values, width)
    assert packed.nbytes == -(-count * width // 8)
    bits = "".join(format(v, f"0{width}b")[::-1] for v in values.tolist())
    assert "".join(format(b, "08b")[::-1] for b in packed.tolist()).startswith(bits)
    assert np.array_equal(unpack_bits(packed, width, count), values)


def test_packing_goes_chunk_by_chunk():
    values = np.arange((1 << 16) + 5) % 8191
    assert np.array_equal(unpack_bits(pack_bits(values, 13), 13, values.size), values)


@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0, 1000.0])
@pytest.mark.parametrize("offset", [0.0, -900.0])
def test_log_weights_move_by_half_a_step(scale, offset):
    x = offset + scale * torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).double().cumsum(1)
    weights = TokenLogWeights.quantize(x)
    weights.validate()
    assert (weights.values().double() - x).abs().max() <= weights.step / 2 + 1e-6 * x.abs().max()
    span = x.diff(dim=1, prepend=torch.zeros(20, 1)).double()
    assert weights.step <= max(0.125, 2 * float(span.max() - span.min()) / 254)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_log_weights_that_are_no_numbers_are_refused(bad):
    x = torch.zeros(2, 3)
    x[1, 1] = bad
    with pytest.raises(RejectedMessageError, match="scale of log-weights"):
        example(weights=TokenLogWeights.quantize(x)).validate()


def test_narrowed_keeps_the_windows_that_weigh_most():
    kept = example().truncated(0.5)
    assert kept.rows.tolist() == [9] and kept.ids.tolist() == [1, 3] and kept.sizes.tolist() == [[0, 2]]
    torch.testing.assert_close(kept.weights.values(), torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(kept.tail.exp(), torch.tensor([[1.0, 0.1]]))
    kept.validate()
    assert example().truncated(0.3) is None
    even = example(weights=None, rows=None).truncated(0.5)
    assert even.rows.tolist() == [0] and even.ids.tolist() == [0, 4, 7, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ids": torch.tensor([4, 0, 7, 2, 1, 3], dtype=torch.int32)}, "do not rise"),
        ({"ids": torch.tensor([0, 4, 8, 2, 1, 3], dtype=torch.int32)}, "outside of a vocabulary of 8"),
        ({"ids": torch.tensor([0, 4, 7], dtype=torch.int32)}, "6 ids announced, 3"),
        ({"values": torch.full((6,), math.nan)}, "not finite"),
        ({"values": torch.full((6,), 1.0)}, "log-probabilities above 0"),
        ({"values": torch.zeros(6, dtype=torch.int64)}, "real numbers"),
        ({"values": torch.ones(6, dtype=torch.uint8)}, "drawn ones have none"),
        ({"values": torch.zeros(6, dtype=torch.uint8), "tail": None}, "not even once"),
        ({"tail": None}, "need a tail"),
        ({"tail": torch.zeros(2, 3)}, "tails"),
        ({"rows": torch.tensor([4])}, "2 windows need as many int64 rows"),
        ({"rows": torch.tensor([4, -1])}, "negative"),
        ({"weights": TokenLogWeights.quantize(torch.zeros(2, 3))}, "weights"),
        ({"samples": -1}, "sample count"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, reason):
    example().validate()
    with pytest.raises(RejectedMessageError, match=reason):
        example(**changes).validate()


@pytest.mark.parametrize(
    ("fields", "meta"),
    [
        ({"ids": None}, {}),
        ({"values": np.zeros((2, 3), np.float32)}, {}),
        ({"values": np.zeros(6, np.uint8)}, {}),
        ({"ids": np.zeros(3, np.uint8)}, {}),
        ({"sizes": np.array([[3, 1], [0, 3]], np.uint8)}, {}),
        ({"sizes": np.array([[3, 1, 0, 2]], np.int64)}, {}),
        ({"sizes": np.array([[2**64 - 1, 7]], np.uint64)}, {}),
        ({"sizes": None}, {}),
        ({"sizes": None}, {"size": 4, "length": 1}),
        ({"sizes": None}, {"size": 0, "length": 1}),
        ({"sizes": None}, {"size": 1 << 62, "length": 1 << 62}),
        ({"tail": np.zeros(3, np.float32)}, {}),
        ({"rows": np.zeros(5, np.uint8)}, {}),
        ({"more": np.zeros(5, np.uint8)}, {}),
        ({}, {"more": 1}),
        ({}, {"width": 0}),
        ({}, {"width": 60}),
        ({}, {"width": 1.0}),
        ({}, {"form": 2}),
        ({}, {"vocab": 6}),
        ({}, {"vocab": -1}),
        ({}, {"least": None}),
    ],
)
def test_what_cannot_be_built_is_refused(fields, meta):
    message = example()
    SparseResponses.build(message.fields(), message.meta()).validate()
    fields = {name: value for name, value in (message.fields() | fields).items() if value is not None}
    meta = {name: value for name, value in (message.meta() | meta).items() if value is not None}
    with pytest.raises(RejectedMessageError):
        SparseResponses.build(fields, meta).validate()


def test_a_large_claim_takes_no_memory():
    message = dataclasses.replace(example(), sizes=torch.tensor([[3, 1], [0, 2]], dtype=torch.int32))
    meta = message.meta() | {"size": 6, "length": 1 << 40}
    fields = message.fields()
    del fields["sizes"]
    with allocates_at_most(1 << 20), pytest.raises(RejectedMessageError, match="do not fill windows"):
        SparseResponses.build(fields, meta)
