"""Choices of places: exact, never longer than a bit a place, and distrusted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.comm.stages import positions
from fdl.errors import RejectedMessageError


@st.composite
def choices(draw):
    count = draw(st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 16384, 16385, 3_000_000])))
    few = st.lists(st.integers(0, count - 1), max_size=12, unique=True)
    many = st.integers(0, 2**32).map(lambda s: np.flatnonzero(np.random.default_rng(s).random(min(count, 500)) < 0.5))
    return count, np.array(sorted(draw(st.one_of(few, many))), np.int64)


@settings(max_examples=200, deadline=None)
@given(choices())
def test_round_trip_in_the_shorter_code(choice):
    count, places = choice
    data = positions.encode(places, count)
    assert data.dtype == np.uint8
    gaps = np.diff(places, prepend=-1) - 1
    distances = sum(max(1, -(-int(gap).bit_length() // 7)) for gap in gaps)
    assert data.size == min(distances, -(-count // 8))
    assert positions.fits(data.size, places.size, count)
    assert np.array_equal(positions.decode(data, places.size, count), places)


def test_by_hand():
    assert positions.encode(np.array([0, 3, 9]), 16).tolist() == [0b00001001, 0b00000010]
    assert positions.encode(np.array([5, 206]), 10_000).tolist() == [5, 200 & 127 | 128, 1]
    assert positions.encode(np.array([], int), 100).size == 0


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 70), st.integers(1, 600))
def test_any_bytes_are_refused_or_rising_places(data, chosen, count):
    array = np.frombuffer(data, np.uint8)
    try:
        places = positions.decode(array, chosen, count)
    except RejectedMessageError:
        return
    assert places.size == chosen
    assert (np.diff(places) > 0).all()
    assert not chosen or 0 <= places[0] <= places[-1] < count


@pytest.mark.parametrize(
    "data, chosen, reason",
    [
        ([5, 129], 2, "cut short"),
        ([5, 6], 3, "not 3 of 10000"),
        ([255] * 9 + [1], 1, "more than 63 bits"),
        ([255, 255, 1], 1, "beyond the last"),
        ([255, 77, 127, 127], 3, "not 3 of"),
    ],
)
def test_damage(data, chosen, reason):
    with pytest.raises(RejectedMessageError, match=reason):
        positions.decode(np.array(data, np.uint8), chosen, 10_000)
    assert not positions.fits(1250 + 1, 10, 10_000)
    assert not positions.fits(3, 4, 10_000)
    assert not positions.fits(1250, 10_001, 10_000)
