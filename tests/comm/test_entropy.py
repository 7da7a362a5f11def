"""Lossless stages: they are what they say, and do not believe what they are sent."""

import contextlib
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.stages.entropy import BestOf, Deflate, Zstd
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.range_coder import AnsCoder
from fdl.errors import RejectedMessageError, UserError
from tests.comm.strategies import allocates_at_most

STAGES = [Deflate(), Zstd(), AnsCoder(), BestOf([Zstd(), AnsCoder(), Deflate()]), Zstd(level=19)]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=400))
def test_round_trip(stage, data):
    assert stage.expand(memoryview(stage.compress(data)), len(data)) == data


def test_deflate_is_huffman_only():
    data = b"a" * 10_000
    coded = Deflate().compress(data)
    # No matches: one bit a byte is the least that a Huffman code reaches; a search for repeats would need 30 bytes.
    assert len(data) / 8 <= len(coded) <= len(data) / 8 + 40
    assert zlib.decompress(coded, -zlib.MAX_WBITS) == data
    # Huffman: entropy <= length < entropy + 1 bit a symbol, plus one table a block
    codes = np.random.default_rng(0).binomial(20, 0.5, 30000).astype(np.uint8)
    p = np.bincount(codes)[np.bincount(codes) > 0] / codes.size
    entropy = -(p * np.log2(p)).sum()
    assert entropy * codes.size / 8 <= len(Deflate().compress(codes.tobytes())) <= (entropy + 0.1) * codes.size / 8


def test_zstd_is_a_plain_frame():
    data = b"ab" * 5000
    assert zstandard.decompress(Zstd().compress(data)) == data
    assert len(Zstd().compress(data)) < 40


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_other_sizes_cuts_and_tails_are_refused(stage):
    data = bytes(range(200)) * 20
    coded = stage.compress(data)
    assert stage.expand(memoryview(coded), len(data)) == data
    coder = "|".join([stage.name, *(inner.name for inner in getattr(stage, "stages", ()))])
    for size in (1, len(data) - 1, len(data) + 1, 10 * len(data)):
        with pytest.raises(RejectedMessageError, match=coder):
            stage.expand(memoryview(coded), size)
    for damaged in (coded + b"\0", coded + coded, b"", *(coded[:end] for end in range(0, len(coded), 7))):
        with pytest.raises(RejectedMessageError, match=coder):
            stage.expand(memoryview(damaged), len(data))


@pytest.mark.parametrize(
    "stage, bomb",
    [
        (Deflate(), lambda raw: zlib.compress(raw, 9, -zlib.MAX_WBITS)),
        (Zstd(), lambda raw: zstandard.ZstdCompressor(level=19).compress(raw)),
        (Zstd(), lambda raw: zstandard.ZstdCompressor(write_content_size=False).compress(raw)),
    ],
    ids=["deflate", "zstd", "zstd without a size"],
)
def test_bombs_do_not_go_off(stage, bomb):
    coded = bomb(bytes(50_000_000))
    with allocates_at_most(200_000), pytest.raises(RejectedMessageError):
        stage.expand(memoryview(coded), 1000)


def test_zstd_frame_that_asks_for_a_wide_window_is_refused():
    frame = Zstd().compress(bytes(2000))
    assert frame[4] == 0x60  # one segment: its window is its content, whose size is in the next two bytes
    forged = memoryview(frame[:4] + bytes([0x40, 16 << 3]) + frame[5:])  # a window of 2**(10 + 16) instead
    stated = zstandard.get_frame_parameters(forged)
    assert (stated.content_size, stated.window_size) == (2000, 1 << 26)
    with pytest.raises(RejectedMessageError, match="zstd"):
        Zstd().expand(forged, 2000)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), size=st.integers(1, 5000))
def test_random_bytes_are_refused_or_expand_to_the_size(data, size):
    for stage in STAGES[:4]:
        with contextlib.suppress(RejectedMessageError):
            assert len(stage.expand(memoryview(data), size)) == size


def test_bad_level():
    with pytest.raises(UserError, match="level must be in 1 … 22, got 0"):
        Zstd(level=0)


def entropy_bytes(data):
    p = np.bincount(data) / data.size
    return -(p[p > 0] * np.log2(p[p > 0])).sum() * data.size / 8


@pytest.mark.parametrize("spread", [0.02, 0.3, 4.0, 40.0])
def test_range_is_within_one_percent_of_the_entropy(spread):
    codes = np.clip(np.random.default_rng(0).normal(100, spread, 200_000), 0, 255).astype(np.uint8)
    best = entropy_bytes(codes)
    size = len(AnsCoder().compress(codes.tobytes()))
    assert best <= size <= 1.01 * best + 300
    assert len(BestOf([Deflate(), AnsCoder()]).compress(codes.tobytes())) <= size + 1


def test_range_spends_fractions_of_a_bit():
    flags = (np.random.default_rng(0).random(80_000) < 0.01).astype(np.uint8)
    size = len(AnsCoder().compress(flags.tobytes()))
    assert size <= 1.01 * entropy_bytes(flags) + 12
    assert size < len(Deflate().compress(flags.tobytes())) / 10  # Huffman: a bit at least


def test_range_of_one_symbol_is_its_table():
    assert len(AnsCoder().compress(b"\x07" * 100_000)) == 3 + 2 + 3
    assert AnsCoder().expand(memoryview(b"\x05\x07\x07\x01"), 5) == b"\x07" * 5


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "table"),
        (b"\x64\x05\x06\x01", "table"),
        (b"\x64\x05\x04\x01", "stream"),
        (b"\x63\x00\x00\x01", "exactly"),
        (b"\x64\x00\x01\xff\xff\xff\x01\x01", "stream"),  # a frequency beyond all
        (b"\x64\x00\x01\x00\x00", "stream"),  # frequencies that sum to nothing
        (b"\x64\x00\x01\x01\x01abc", "stream"),  # no whole words
        (b"\x64\x00\x01\x01\x01\1\0\0\0\0\0\0\0", "stream"),  # a last word of zero
        (b"\x64\x00\x00\x01\1\0\0\0", "exactly"),
        (b"\x64\x00\x01\x01\x01" + b"\1\2\3\4" * 50, "exactly"),
    ],
)
def test_damaged_range_streams(data, reason):
    with pytest.raises(RejectedMessageError, match=f"range: .*{reason}"):
        AnsCoder().expand(memoryview(data), 100)


def test_range_takes_little_memory():
    data = np.random.default_rng(0).binomial(9, 0.5, 2_000_000).astype(np.uint8).tobytes()
    coded = AnsCoder().compress(data)
    with allocates_at_most(5_000_000):
        assert AnsCoder().expand(memoryview(coded), len(data)) == data


def test_best_names_the_coder_and_costs_one_byte():
    repeats, flags = b"abcdefgh" * 500, (np.random.default_rng(0).random(4000) < 0.01).astype(np.uint8).tobytes()
    stage = BestOf([Zstd(), AnsCoder()])
    for data, number in ((repeats, 0), (flags, 1)):
        coded = stage.compress(data)
        assert coded == bytes([number]) + stage.stages[number].compress(data)
        assert len(coded) == 1 + min(len(s.compress(data)) for s in stage.stages)
    with pytest.raises(RejectedMessageError, match="best: no coder number 2"):
        stage.expand(memoryview(b"\x02abc"), 10)
    assert str(stage) == "best(zstd|range)"
    for stages in ([Deflate()], [], [Deflate(), Quantize(8)], [Deflate(), stage]):
        with pytest.raises(UserError, match="stages must be"):
            BestOf(stages)
