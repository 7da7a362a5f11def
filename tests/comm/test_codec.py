"""Chains over many arrays: what comes back, how many bytes it takes, and what a decoder refuses."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.binary import Reader, text, varint
from fdl.comm.codec import Codec
from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray
from fdl.comm.stages.cast import Float16
from fdl.comm.stages.entropy import Deflate, Zstd
from fdl.comm.stages.quantize import Quantize
from fdl.errors import RejectedMessageError, UserError
from fdl.state.float_formats import BFLOAT16, is_float_dtype
from tests.comm.strategies import CHAINS, FURTHER, LOSSLESS, LOSSY, allocates_at_most, as_float64, fields, same

LIMIT = 1 << 20
RNG = np.random.default_rng(0)


def blob(codec, schema, *streams):
    """A message by hand: the chain's signature, the schema and its length, then streams."""
    return codec.signature + varint(len(schema)) + schema + b"".join(streams)


@pytest.mark.parametrize("codec", LOSSLESS, ids=repr)
@settings(max_examples=80, deadline=None)
@given(arrays=fields)
def test_lossless_chains_return_every_bit(codec, arrays):
    back = codec.decode(codec.encode(arrays), LIMIT)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert same(back[name], array)
        assert back[name].flags.writeable
        assert back[name].flags.aligned


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
@settings(max_examples=25, deadline=None)
@given(arrays=fields)
def test_lossy_chains_touch_only_what_they_may(codec, arrays):
    back = codec.decode(codec.encode(arrays, RNG), LIMIT)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        got = back[name]
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        if not is_float_dtype(array.dtype) or array.ndim == 0 or array.size <= 8:
            assert same(got, array)
        elif array.size:
            x = as_float64(array)
            assert np.isfinite(as_float64(got)).all()
            # nothing is further off than the range of the array, or than float16 saturates
            reach = max(x.max() - x.min(), np.abs(x).max() if isinstance(codec.stages[0], Float16) else 0)
            slack = 2.0**-7 * np.abs(x).max() + 1e-6
            assert np.abs(as_float64(got) - x).max() <= reach * (1 + 1 / 64) + slack


@pytest.mark.parametrize("dtype", ["bool", "uint16", "int64", "float64", "float16", "float32"])
def test_scalars_empty_and_strided_arrays(dtype):
    arrays = {
        "scalar": np.array(1, dtype),
        "empty": np.zeros((0, 3), dtype),
        "none": np.zeros((2, 0, 5), dtype),
        "transposed": np.arange(12).reshape(3, 4).astype(dtype).T,
        "every other": np.arange(40).astype(dtype)[::2],
        "reversed": np.arange(5).astype(dtype)[::-1],
        "": np.array([3], dtype),
    }
    for codec in LOSSLESS:
        back = codec.decode(codec.encode(arrays), LIMIT)
        assert all(same(back[name], array) for name, array in arrays.items())
    assert Codec().decode(Codec().encode({}), 0) == {}


def test_layout_by_hand():
    arrays = {"w": np.array([[1.0, 2.0]], np.float32), "n": np.array(7, np.int64)}
    signature = (zlib.crc32(b"") & 0xFFFF).to_bytes(2, "little")
    schema = bytes([2, 1]) + b"w" + bytes([10 | 2 << 4, 1, 2]) + bytes([1]) + b"n" + bytes([4])
    # the eight-byte counter stands first in the stream, so that it is aligned
    stream = np.int64(7).tobytes() + arrays["w"].tobytes()
    assert Codec().encode(arrays) == signature + bytes([len(schema)]) + schema + stream


def test_quantised_layout_by_hand():
    codec = Codec([Quantize(4)])
    arrays = {"a": np.arange(16, dtype=np.float32), "b": np.arange(16, dtype=np.float32) * 2, "n": np.array([5], "u1")}
    signature = (zlib.crc32(b"quantize/row") & 0xFFFF).to_bytes(2, "little")
    schema = b"\x03" + b"\x01a\x1a\x10\x03" + b"\x01b\x1a\x10\x03" + b"\x01n\x15\x01\x00"
    codes = bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    ends = np.array([0, 15, 0, 30], np.float16).tobytes()
    assert codec.encode(arrays) == signature + bytes([len(schema)]) + schema + b"\x05" + codes + codes + ends


@pytest.mark.parametrize("stage", [Deflate(), Zstd()], ids=lambda stage: stage.name)
def test_a_stream_that_would_grow_is_left_as_it_is(stage):
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    raw, coded = Codec().encode({"x": noise}), Codec([stage]).encode({"x": noise})
    assert len(coded) == len(raw) + 1
    assert coded[-5001:] == b"\0" + noise.tobytes()


def test_two_hundred_tensors_share_two_streams():
    rng = np.random.default_rng(0)
    arrays = {f"layer{i:03d}": rng.normal(size=(8, 32)).astype(np.float32) for i in range(200)}
    coded = Codec([Quantize(8), Deflate()]).encode(arrays)
    parts = [Quantize(8).encode(array, CodecContext()) for array in arrays.values()]
    streams = (b"".join(p.main.tobytes() for p in parts), b"".join(p.sides[0].tobytes() for p in parts))
    deflated = [len(Deflate().compress(stream)) for stream in streams]
    schema = 2 + 200 * (1 + 8 + 1 + 2 + 1)
    assert len(coded) == 2 + len(varint(schema)) + schema + sum(n + len(varint(n)) for n in deflated)


def test_report():
    codec = Codec([Quantize(8), Zstd()])
    arrays = {"w": np.random.default_rng(0).normal(size=(10, 100)).astype(np.float32), "n": np.arange(4)}
    coded = codec.encode(arrays)
    quantised, entropy = codec.last_report
    assert quantised == ("quantize", 4000 + 32, 1000 + 40 + 32)
    assert entropy[:2] == ("zstd", 1072)
    assert entropy.bytes_out == len(coded) - (2 + 1 + 1 + (2 + 1 + 2 + 1) + (2 + 1 + 1 + 1))
    assert Codec().last_report == ()
    assert repr(codec) == "quantize/8/row → zstd"


def test_small_and_costly_arrays_are_left_alone():
    codec = Codec([Quantize(8)])
    arrays = {
        "handful": np.linspace(0, 1, 8).astype(np.float32),
        "narrow rows": np.random.default_rng(0).random((20, 1)).astype(np.float32),  # two ends for each value
        "far from zero": 1000 + np.random.default_rng(0).random((20, 2)).astype(np.float32),  # float32 ends do not pay
    }
    back = codec.decode(codec.encode(arrays), LIMIT)
    assert all(same(back[name], array) for name, array in arrays.items())
    assert codec.last_report[0].bytes_in == codec.last_report[0].bytes_out
    half = {"x": np.random.default_rng(0).random(50).astype(np.float16)}
    assert same(Codec([Float16()]).decode(Codec([Float16()]).encode(half), LIMIT)["x"], half["x"])


class LargerHalf(ArrayStage):
    """Keeps the half of the values that is largest in magnitude; the rest is zero."""

    name = "larger_half"
    phase = 10

    def encode(self, array, turn):
        keep = np.sort(np.argsort(-np.abs(array.reshape(-1)), kind="stable")[: array.size // 2])
        return EncodedArray(1, array.reshape(-1)[keep], (keep.astype(np.uint16),))

    def layout(self, spec, variant, extents=()):
        return ArraySpec(spec.dtype, (spec.size // 2,)), ArraySpec(np.dtype(np.uint16), (spec.size // 2,))

    def decode(self, spec, coded, turn):
        out = np.zeros(spec.size, spec.dtype)
        out[coded.sides[0]] = coded.main
        return out.reshape(spec.shape)


def test_a_further_array_stage_composes():
    codec = Codec([LargerHalf(), Quantize(8), Deflate()])
    x = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    back = codec.decode(codec.encode({"x": x, "y": x[:3]}), LIMIT)["x"]
    kept = back != 0
    assert 498 <= kept.sum() <= 500
    step = (x.max() - x.min()) / 255
    assert np.abs(back - x)[kept].max() <= step / 2 * 1.02
    assert np.abs(x[~kept]).max() <= np.median(np.abs(x)) + step
    larger, quantised, _ = codec.last_report
    assert (larger.bytes_in, larger.bytes_out) == (4000 + 600, (2000 + 1000) + (300 + 150))
    assert quantised.bytes_out == (500 + 4 + 1000) + (75 + 4 + 150)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([Zstd(), Quantize(8)], r"stage 1 \(quantize\) must come before stage 0 \(zstd\)"),
        ([Float16(), Quantize(8)], r"stage 1 \(quantize\) does the same work as stage 0 \(float16\)"),
        ([Quantize(8), Zstd(), Deflate()], r"stage 2 \(deflate\) does the same work as stage 1 \(zstd\)"),
        ([Deflate(), Deflate()], r"stage 1 \(deflate\) does the same work as stage 0 \(deflate\)"),
        ([Float16(), "zstd"], r"stage 1 \(str\) is neither"),
    ],
)
def test_chains_that_make_no_sense(stages, message):
    with pytest.raises(UserError, match=message):
        Codec(stages)


def test_what_cannot_be_sent():
    with pytest.raises(UserError, match="'z' of dtype complex64"):
        Codec().encode({"z": np.zeros(3, np.complex64)})
    with pytest.raises(UserError, match="rank 16"):
        Codec().encode({"deep": np.zeros((1,) * 16)})
    with pytest.raises(UserError, match="dtype object"):
        Codec().encode({"o": np.array([None])})


def test_another_chain_is_noticed():
    arrays = {"x": np.random.default_rng(0).random((20, 20)).astype(np.float32)}
    signatures = [{codec.signature for codec in chains} for chains in (LOSSLESS, LOSSY, FURTHER)]
    assert list(map(len, signatures)) == [
        5,
        3 * (2 + 1 + 1),
        9,
    ]  # a message tells its bits, and rounding is the sender's own
    for codec in (Codec(), Codec([Float16()]), Codec([Quantize(8, granularity="tensor")])):
        with pytest.raises(RejectedMessageError, match="another codec chain"):
            codec.decode(Codec([Quantize(8)]).encode(arrays), LIMIT)


FLOAT32, INT64, BOOL = 10, 4, 0
MATRIX = FLOAT32 | 2 << 4


@pytest.mark.parametrize(
    "codec, schema, stream, reason",
    [
        (Codec(), b"", b"", "cut short"),
        (Codec(), varint(1 << 40), b"", "arrays announced"),
        (Codec(), varint(3), b"", "cut short"),
        (Codec(), b"\xff" * 9 + b"\x7f", b"", "64 bits"),
        (Codec(), b"\xff" * 30, b"", "64 bits"),
        (Codec(), b"\x01" + varint(1 << 60) + b"x", b"", "cut short"),
        (Codec(), b"\x01" + text("x") + bytes([MATRIX]) + varint(1 << 30) + varint(1 << 30), b"", "beyond the limit"),
        (
            Codec(),
            b"\x01" + text("x") + bytes([FLOAT32 | 15 << 4]) + varint((1 << 64) - 1) * 15,
            b"",
            "beyond the limit",
        ),
        (Codec(), b"\x01" + text("x") + bytes([MATRIX]) + varint(1 << 62) + b"\0", b"", "beyond the limit"),
        (Codec(), b"\x01" + text("x") + bytes([MATRIX]) + varint(400) + varint(600), b"", "cut short"),
        (Codec(), b"\x02" + (text("x") + bytes([MATRIX]) + varint(400) + varint(400)) * 2, b"", "two arrays"),
        (Codec(), b"\x02" + b"".join(text(n) + bytes([MATRIX, 200, 4, 200, 4]) for n in "xy"), b"", "beyond the limit"),
        (Codec(), b"\x01" + text("x") + bytes([13]), b"", "unknown dtype 13"),
        (Codec(), b"\x01\x02\xff\xfe\x00", b"", "not UTF-8"),
        (Codec(), b"\x00" + b"\x00", b"", "1 bytes too many"),
        (Codec(), b"\x01" + text("x") + bytes([BOOL | 1 << 4, 2]), b"\1\2", "neither 0 nor 1"),
        (Codec([Quantize(8)]), b"\x01" + text("x") + bytes([MATRIX, 20, 20, 9]), b"", "no variant 9"),
        (Codec([Quantize(8)]), b"\x01" + text("x") + bytes([INT64 | 1 << 4, 20, 1]), b"", "does not apply to int64"),
        (Codec([Quantize(8)]), b"\x01" + text("x") + bytes([FLOAT32, 1]), b"", "does not apply to float32 of rank 0"),
        (Codec([Quantize(8)]), b"\x01" + text("x") + bytes([FLOAT32 | 1 << 4, 8, 1]), b"", "does not apply"),
        (Codec([Quantize(8)]), b"\x01" + text("x") + bytes([MATRIX, 0, 20, 1]), b"", "does not apply"),
        (Codec([Quantize(8)]), b"\x01" + text("x") + bytes([MATRIX, 20, 1, 2]), b"", "would enlarge"),
        (Codec([Quantize(8)]), b"\x01" + text("x") + bytes([MATRIX, 20, 20, 1]), bytes(479), "cut short"),
        (Codec([Deflate()]), b"\x01" + text("x") + bytes([MATRIX, 9, 9]), varint(324), "not shorter"),
        (Codec([Zstd()]), b"\x01" + text("x") + bytes([MATRIX, 9, 9]), varint(300) + bytes(10), "cut short"),
        (Codec([Deflate()]), b"\x01" + text("x") + bytes([MATRIX, 9, 9]), varint(9) + bytes(9), "deflate"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_hostile_messages_are_refused_without_memory(codec, schema, stream, reason):
    data = blob(codec, schema, stream)
    with allocates_at_most(100_000), pytest.raises(RejectedMessageError, match=reason):
        codec.decode(data, LIMIT)


def test_a_layout_is_known_only_once_it_was_read_to_its_end():
    codec = Codec([Quantize(8)])
    good = codec.encode({"x": np.ones((20, 20), np.float32)})
    for _ in range(2):
        for schema in (b"\x02" + good[4:11], good[3:11] + b"\0", b"\x01" + text("x") + bytes([MATRIX, 200, 200])):
            with pytest.raises(RejectedMessageError):
                codec.decode(blob(codec, schema, good[11:]), LIMIT)
    assert not codec._layouts
    for _ in range(2):
        assert codec.decode(good, 1600)["x"].sum() == 400
        with pytest.raises(RejectedMessageError, match="beyond the limit of 1599 bytes"):
            codec.decode(good, 1599)
    assert len(codec._layouts) == 1


def test_known_layouts_do_not_pile_up():
    codec = Codec()
    for n in range(1, 200):
        codec.decode(codec.encode({"x": np.ones(n, np.float32)}), LIMIT)
    assert len(codec._layouts) <= 16
    assert len(codec._schemas) <= 16
    for count in (1, 3000):
        arrays = {f"{'x' * 30}{i}": np.ones(2, np.float32) for i in range(count)}
        assert all(same(a, b) for a, b in zip(codec.decode(codec.encode(arrays), LIMIT).values(), arrays.values()))
    assert max(map(len, codec._layouts)) <= 1 << 16


@pytest.mark.parametrize(
    "stage, bomb",
    [(Deflate(), lambda raw: zlib.compress(raw, 9, -zlib.MAX_WBITS)), (Zstd(), Zstd().compress)],
    ids=["deflate", "zstd"],
)
def test_bombs_within_a_message(stage, bomb):
    codec, zeros = Codec([stage]), bomb(bytes(30_000_000))
    schema = b"\x01" + text("x") + bytes([FLOAT32 | 1 << 4]) + varint(50_000)
    data = blob(codec, schema, varint(len(zeros)), zeros)
    with allocates_at_most(1_000_000), pytest.raises(RejectedMessageError, match=stage.name):
        codec.decode(data, 200_000)


def test_limit_is_the_size_of_the_decoded_arrays():
    for codec in CHAINS:
        data = codec.encode({"x": np.ones((20, 20), np.float32), "n": np.arange(3)}, RNG)
        assert codec.decode(data, 1624)["n"].tolist() == [0, 1, 2]
        with pytest.raises(RejectedMessageError, match="beyond the limit of 1623 bytes"):
            codec.decode(data, 1623)


@pytest.mark.parametrize("codec", CHAINS, ids=repr)
def test_every_cut_is_refused(codec):
    data = codec.encode({"x": np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32), "n": np.arange(2)}, RNG)
    for end in range(len(data)):
        with pytest.raises(RejectedMessageError):
            codec.decode(data[:end], LIMIT)
    with pytest.raises(RejectedMessageError):
        codec.decode(data + b"\0", LIMIT)


@pytest.mark.parametrize("codec", CHAINS, ids=repr)
@pytest.mark.filterwarnings("error")
def test_damage_that_no_checksum_caught_is_refused_or_decodes_within_the_limit(codec):
    rng = np.random.default_rng(1)
    arrays = {"x": rng.normal(size=(5, 9)).astype(np.float32), "b": np.array([True, False]), "h": rng.random(30)}
    arrays["z"] = (rng.random(20).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
    good = codec.encode(arrays, RNG)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.integers(1, 5)):
            start = rng.integers(2, len(data))
            data[start : start + rng.integers(0, 3)] = rng.bytes(rng.integers(0, 3))
        try:
            back = codec.decode(bytes(data), 10_000)
        except RejectedMessageError:
            continue
        assert sum(array.nbytes for array in back.values()) <= 10_000


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=100), which=st.sampled_from(CHAINS))
def test_random_bytes_are_refused_or_small(data, which):
    try:
        back = which.decode(which.signature + data, 10_000)
    except RejectedMessageError:
        return
    assert sum(array.nbytes for array in back.values()) <= 10_000


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_varint(value):
    data = varint(value)
    assert len(data) == max(1, -(-value.bit_length() // 7))
    reader = Reader(data)
    assert reader.varint() == value
    reader.finish()
