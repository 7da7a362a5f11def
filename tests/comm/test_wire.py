"""Bytes of one message: the header by hand, and every way to damage or forge it."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fdl.comm.binary import text, varint
from fdl.comm.codec import Codec
from fdl.comm.stages.entropy import Deflate, Zstd
from fdl.comm.stages.quantize import Quantize
from fdl.comm.wire import BROADCAST, HEADER, _decode_meta, _encode_meta, pack, unpack
from fdl.errors import RejectedMessageError
from fdl.messages import Parameters, QuantizedLogWeights, Responses
from fdl.state.flat_tensors import FlatTensors
from tests.comm.strategies import CHAINS, allocates_at_most

RAW = Codec()
LIMIT = 1 << 20


def responses(n=40, c=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    confidence = QuantizedLogWeights.quantize(torch.randn(n, generator=g))
    return Responses(torch.randn(n, c, generator=g), "logits", torch.arange(n), confidence, 12)


def packed(message, codec=RAW, client=3, round=7):
    return pack(message, codec, client=client, round=round, rng=np.random.default_rng(0))


def unpacked(data, codec=RAW, limit=LIMIT, client=3, round=7):
    return unpack(data, codec, limit=limit, client=client, round=round)


def forge(body, code=1, client=3, round=7, length=None):
    """A message whose header and checksum are right, whatever it holds."""
    rest = struct.pack("<BIIQ", code, client, round, len(body) if length is None else length) + body
    return b"FDL\x01" + struct.pack("<I", zlib.crc32(rest)) + rest


def test_header_by_hand():
    data = packed(Parameters({"w": torch.tensor([1.0, 2.0])}, samples=9))
    signature = struct.pack("<H", zlib.crc32(b"") & 0xFFFF)
    body = b"\x01\x07samplesi\x12" + signature + b"\x05\x01\x01w\x1a\x02" + struct.pack("<2f", 1, 2)
    assert HEADER == 25
    assert data == forge(body)
    assert torch.equal(unpacked(data).tensors["w"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("codec", CHAINS, ids=repr)
def test_a_model_with_batch_norm_survives_every_chain(codec):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    model[1].num_batches_tracked += 2**40 + 1
    state = dict(model.state_dict()) | {"mask": torch.tensor([True, False] * 9), "half": torch.rand(4, 5).bfloat16()}
    got = unpacked(packed(Parameters(state, 100), codec), codec)
    assert list(got.tensors) == list(state)
    for name, tensor in state.items():
        received = got.tensors[name]
        assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape)
        if not tensor.is_floating_point():
            assert torch.equal(received, tensor)
        received.zero_()  # writable, and no part of what was sent
    assert got.samples == 100
    assert state["1.num_batches_tracked"] == 2**40 + 1


def test_one_buffer_is_sent_as_its_arrays_are():
    pieces = FlatTensors(torch.randn(11), {"a": (2, 4), "b": (3,)})
    message = Parameters(pieces, 5)
    alone = Parameters({name: value.clone() for name, value in pieces.items()}, 5)
    for codec in (RAW, Codec([Deflate()]), Codec([Quantize(8)])):
        sent = pack(message, codec, client=1, round=2, rng=np.random.default_rng(0))
        assert sent == pack(alone, codec, client=1, round=2, rng=np.random.default_rng(0))
        got = unpack(sent, codec, limit=LIMIT, client=1, round=2)
        assert list(got.tensors) == ["a", "b"] and got.tensors["a"].shape == (2, 4)
        if codec is RAW:
            assert all(torch.equal(got.tensors[name], value) for name, value in pieces.items())


def test_both_checksums_are_the_same():
    isal = pytest.importorskip("isal.isal_zlib", reason="isal has no wheel for this processor")
    for data in (b"", b"fdl", np.arange(24, dtype=np.float32).reshape(4, 6), memoryview(b"abcdef")[2:]):
        assert isal.crc32(data, 77) == zlib.crc32(data, 77)


def test_raw_responses_are_exact():
    message = responses()
    got = unpacked(packed(message))
    assert torch.equal(got.values, message.values)
    assert torch.equal(got.rows, message.rows)
    assert torch.equal(got.confidence.values(), message.confidence.values())


def test_overhead_of_a_small_message():
    message = responses(400, 10)
    message = Responses(message.values, "logits", None, message.confidence, 1234)
    data = packed(message, Codec([Quantize(8)]))
    codes, ends, confidences = 4000, 400 * 2 * 2, 400
    assert len(data) - codes - ends - confidences <= 100
    assert len(packed(message, Codec([Quantize(8), Deflate()]))) < len(data)


@pytest.mark.parametrize("codec", [RAW, Codec([Quantize(4), Deflate()]), Codec([Zstd()])], ids=repr)
def test_every_changed_byte_cut_and_tail_is_refused(codec):
    data = packed(responses(12, 3), codec)
    unpacked(data, codec)
    for position in range(len(data)):
        for change in (1, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= change
            with pytest.raises(RejectedMessageError):
                unpacked(bytes(damaged), codec)
        with pytest.raises(RejectedMessageError):
            unpacked(data[:position], codec)
    for tail in (b"\0", data):
        with pytest.raises(RejectedMessageError):
            unpacked(data + tail, codec)


def test_reasons():
    data = packed(responses())
    cases = [
        (b"", {}, "cut short"),
        (b"\x80\x04\x95 pickle", {}, "not a message of this version"),
        (b"FDL\x02" + data[4:], {}, "not a message of this version"),
        (data[:40] + b"?" + data[41:], {}, "checksum does not match"),
        (data, {"client": 4}, "message of client 3 where one of client 4 was due"),
        (data, {"client": BROADCAST}, "message of client 3 where one of the server to all was due"),
        (data, {"round": 8}, "message of round 7 in round 8"),
        (data, {"limit": 100}, "beyond the limit of 100 bytes"),
        (data, {"codec": Codec([Zstd()])}, "another codec chain"),
        (forge(data[25:], code=99), {}, "unknown message type 99"),
        (forge(data[25:], code=1), {}, "unexpected content 'form'"),
        (forge(data[25:], code=2, length=10), {}, "10 bytes announced"),
        (forge(data[25:], code=2, length=2**64 - 1), {}, "bytes announced"),
        (forge(b"\x02" + 2 * (text("samples") + b"i\x02")), {}, "sent twice"),
        (forge(b"\x01" + text("samples") + b"p\x02"), {}, "unknown type"),
        (forge(b"\x01" + text("samples") + b"d\x02"), {}, "cut short"),
        (forge(varint(2**63)), {}, "9223372036854775808 numbers announced, the most is 64"),
        (packed(Parameters({"w": torch.tensor([float("nan")])})), {}, "tensor 'w' is not finite"),
        (packed(Parameters({}, samples=-3)), {}, "sample count is negative"),
    ]
    for received, changes, reason in cases:
        with pytest.raises(RejectedMessageError, match=reason):
            unpacked(received, **changes)


def test_lengths_beyond_the_limit_take_no_memory():
    schema = b"\x01" + text("w") + b"\x2a" + varint(1 << 14) * 2
    body = b"\x01" + text("samples") + b"i\0" + RAW.signature + varint(len(schema)) + schema
    with allocates_at_most(50_000), pytest.raises(RejectedMessageError, match="beyond the limit"):
        unpacked(forge(body))
    with allocates_at_most(50_000), pytest.raises(RejectedMessageError, match="cut short"):
        unpacked(forge(body), limit=1 << 31)


META_VALUES = st.one_of(st.integers(-(2**62), 2**62), st.floats(), st.text(max_size=20))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=8), META_VALUES, max_size=6))
def test_numbers_beside_the_arrays_are_exact(meta):
    from fdl.comm.binary import Reader

    data = _encode_meta(meta)
    reader = Reader(data)
    back = _decode_meta(reader)
    reader.finish()
    assert list(back) == list(meta)
    for key, value in meta.items():
        assert type(back[key]) is type(value)
        assert back[key] == value or value != value


def test_float32_numbers_take_four_bytes():
    assert len(_encode_meta({"a": 0.5})) == 1 + 2 + 1 + 4
    assert len(_encode_meta({"a": 0.1})) == 1 + 2 + 1 + 8


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), code=st.integers(0, 3), which=st.sampled_from(CHAINS))
def test_forged_messages_are_refused_or_valid(data, code, which):
    for body in (data, b"\x01\x07samplesi\x12" + which.signature + data):
        try:
            unpacked(forge(body, code=code), which, limit=10_000)
        except RejectedMessageError:
            continue


@pytest.mark.parametrize("codec", CHAINS[::3], ids=repr)
@pytest.mark.filterwarnings("error")
def test_damage_behind_a_right_checksum_is_refused_or_valid(codec):
    rng = np.random.default_rng(0)
    refused = 0
    messages = [responses(9, 4), Parameters({"w": torch.randn(4, 9), "n": torch.tensor(3)}, 2)]
    for code, message in ((2, messages[0]), (1, messages[1])):
        good = packed(message, codec)[HEADER:]
        for _ in range(100):
            body = bytearray(good)
            for _ in range(rng.integers(1, 4)):
                start = rng.integers(0, len(body))
                body[start : start + rng.integers(0, 3)] = rng.bytes(rng.integers(0, 3))
            try:
                unpacked(forge(bytes(body), code=code), codec, limit=10_000).validate()
            except RejectedMessageError:
                refused += 1
    assert refused > 50
