"""Lossless stages: they are what they say, and do not believe what they are sent."""

import contextlib
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.entropy import Deflate, Zstd
from fdl.errors import RefusedError, UserError
from tests.comm.strategies import allocates_at_most

STAGES = [Deflate(), Zstd(), Zstd(level=19)]


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
    for size in (1, len(data) - 1, len(data) + 1, 10 * len(data)):
        with pytest.raises(RefusedError, match=stage.name):
            stage.expand(memoryview(coded), size)
    for damaged in (coded + b"\0", coded + coded, b"", *(coded[:end] for end in range(0, len(coded), 7))):
        with pytest.raises(RefusedError, match=stage.name):
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
    with allocates_at_most(200_000), pytest.raises(RefusedError):
        stage.expand(memoryview(coded), 1000)


def test_zstd_frame_that_asks_for_a_wide_window_is_refused():
    frame = Zstd().compress(bytes(2000))
    assert frame[4] == 0x60  # one segment: its window is its content, whose size is in the next two bytes
    forged = memoryview(frame[:4] + bytes([0x40, 16 << 3]) + frame[5:])  # a window of 2**(10 + 16) instead
    stated = zstandard.get_frame_parameters(forged)
    assert (stated.content_size, stated.window_size) == (2000, 1 << 26)
    with pytest.raises(RefusedError, match="zstd"):
        Zstd().expand(forged, 2000)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), size=st.integers(1, 5000))
def test_random_bytes_are_refused_or_expand_to_the_size(data, size):
    for stage in STAGES[:2]:
        with contextlib.suppress(RefusedError):
            assert len(stage.expand(memoryview(data), size)) == size


def test_bad_level():
    with pytest.raises(UserError, match="level must be in 1 … 22, got 0"):
        Zstd(level=0)
