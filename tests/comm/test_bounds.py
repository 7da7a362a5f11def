"""Memory that a decoder takes follows the limit and what was received, never a number that a hostile sender wrote."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fdl.comm.binary import Reader, text, varint
from fdl.comm.codec import Codec
from fdl.comm.layout import DTYPES
from fdl.comm.link_state import LinkState
from fdl.comm.wire import pack, unpack
from fdl.errors import RejectedMessageError, UserError
from fdl.messages import Parameters
from fdl.messages.base import _TYPES
from tests.comm.strategies import CHAINS, allocates_at_most
from tests.comm.test_wire import forge

LIMIT = 1 << 15
#: What stages take beside their result: rows of two values in float16 are remembered by a cache with a name and a round
#: of eight bytes each, and handled in copies.
WORKING = 20
CONSTANT = 200_000

SIZES = st.one_of(st.integers(0, 40), st.sampled_from([2**k + d for k in range(8, 64, 5) for d in (-1, 0)]))


@st.composite
def bodies(draw, codec):
    """Signature, schema and streams whose numbers are anything."""
    schema = [varint(draw(st.one_of(st.just(1), st.just(2), SIZES)))]
    for index in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(SIZES, max_size=3))
        name = "rows" if draw(st.booleans()) and index == 0 else str(index)
        schema += [text(name), bytes((draw(st.integers(0, len(DTYPES))) % 16 | len(shape) << 4,))]
        schema += map(varint, shape)
        for stage in codec._array_stages:
            variant = draw(st.one_of(st.just(0), st.integers(0, 4)))
            schema.append(bytes((variant,)))
            schema += [varint(draw(SIZES)) for _ in range(stage.extents if variant else 0)]
    schema = b"".join(schema)
    length = draw(st.one_of(st.just(len(schema)), SIZES))
    streams = [varint(draw(SIZES)) + draw(st.binary(max_size=60)) for _ in range(draw(st.integers(0, 3)))]
    return codec.signature + varint(length) + schema + b"".join(streams)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(CHAINS))
def test_whatever_a_schema_says(data, codec):
    blob = data.draw(bodies(codec))
    with allocates_at_most(WORKING * LIMIT + CONSTANT):
        try:
            fields = codec.decode(blob, LIMIT, 3, LinkState(LIMIT) if codec.remembers else None)
            assert sum(array.nbytes for array in fields.values()) <= LIMIT
        except RejectedMessageError:
            pass


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([codec for codec in CHAINS if codec._entropy is None]))
def test_what_was_not_received_takes_no_memory_however_high_the_limit(data, codec):
    """Without an entropy coder or a stage that leaves values out, no array is larger than eight times its bytes."""
    if any(stage.omits for stage in codec._array_stages):
        codec = Codec()
    blob = data.draw(bodies(codec))
    with allocates_at_most(50 * len(blob) + CONSTANT), contextlib.suppress(RejectedMessageError):
        codec.decode(blob, 1 << 40, 3, LinkState() if codec.remembers else None)


@pytest.mark.parametrize("codec", CHAINS, ids=repr)
def test_the_largest_message_that_is_let_through(codec):
    rng = np.random.default_rng(0)
    for dtype in (np.float16, np.float32):
        for columns in (2, 10):
            values = np.abs(rng.normal(size=(LIMIT // np.dtype(dtype).itemsize // columns, columns))).astype(dtype)
            values = (values / values.sum(1, keepdims=True)).astype(dtype)
            blob = codec.encode({"values": values}, rng, 1, LinkState() if codec.remembers else None)
            memory = LinkState(LIMIT) if codec.remembers else None
            with allocates_at_most(WORKING * LIMIT + CONSTANT):
                assert codec.decode(blob, LIMIT, 1, memory)["values"].nbytes <= LIMIT


def empty_arrays(count, salt=""):
    """A schema of arrays without a number: a few bytes for each."""
    codec = Codec()
    schema = varint(count) + b"".join(text(f"{salt}{i:x}") + b"\x1a\0" for i in range(count))
    return codec.signature + varint(len(schema)) + schema


def test_arrays_that_hold_nothing_are_not_free():
    Codec().decode(empty_arrays(8192), LIMIT)
    with allocates_at_most(8_000_000):
        Codec().decode(empty_arrays(8192), LIMIT)
    one_more = empty_arrays(8193)
    with (
        allocates_at_most(CONSTANT),
        pytest.raises(RejectedMessageError, match="8193 arrays announced, the most is 8192"),
    ):
        Codec().decode(one_more, LIMIT)
    with pytest.raises(UserError, match="at most 8192 arrays"):
        Codec().encode({str(i): np.zeros(0, np.float32) for i in range(8193)})


def test_a_sender_who_never_repeats_himself_is_not_remembered_for_ever():
    codec, sizes = Codec(), []
    for salt in range(16):
        codec.decode(empty_arrays(3000, f"{salt}-"), LIMIT)
        sizes.append(sum(map(len, codec._layouts)))
    assert 100_000 < max(sizes) <= 1 << 18  # bytes of schemas, a few for each array


def test_numbers_beside_the_arrays_are_few():
    for count in (65, 2**63):
        body = varint(count) + b"".join(text(f"{i:x}") + b"i\x02" for i in range(min(count, 5000)))
        with allocates_at_most(CONSTANT), pytest.raises(RejectedMessageError, match=f"{count} numbers announced"):
            unpack(forge(body), Codec(), limit=LIMIT, client=3, round=7)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(_TYPES)), body=st.binary(max_size=100), length=SIZES, code=st.integers(0, 255))
def test_whatever_a_header_says(kind, body, length, code):
    for chosen in (kind, code):
        for stated in (length, None):
            with allocates_at_most(CONSTANT), pytest.raises(RejectedMessageError):
                unpack(forge(body, code=chosen, length=stated), Codec(), limit=1 << 40, client=3, round=7)


ARRAYS = hnp.arrays(
    st.sampled_from(["<f4", "<f2", "|u1", "<u2", "<i8", "|b1"]), hnp.array_shapes(min_dims=0, max_dims=3, max_side=9)
)
NAMES = ["ids", "values", "tail", "sizes", "weights", "rows", "codes", "features", "logits", "labels", "counts"]
NAMES += ["layer/a", "layer/b"]
NUMBERS = ["form", "vocab", "width", "samples", "size", "length", "least", "step", "lo", "round", "wanted"]


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(_TYPES)),
    fields=st.dictionaries(st.sampled_from(NAMES), ARRAYS, max_size=6),
    numbers=st.dictionaries(
        st.sampled_from(NUMBERS), st.one_of(SIZES, st.integers(-3, 40), st.floats(-9, 9)), max_size=8
    ),
)
@pytest.mark.filterwarnings("error")
def test_whatever_the_numbers_beside_the_arrays_say(kind, fields, numbers):
    with allocates_at_most(CONSTANT), contextlib.suppress(RejectedMessageError):
        _TYPES[kind].build(dict(fields), dict(numbers)).validate()


def test_a_name_and_a_number_longer_than_what_is_there_are_refused():
    for value in (2**20, 2**63, 2**64 - 1):
        with allocates_at_most(CONSTANT), pytest.raises(RejectedMessageError, match="cut short"):
            Reader(varint(value) + b"abc").text()
    with pytest.raises(RejectedMessageError, match="more than 64 bits"):
        Reader(b"\xff" * 40).varint()
    message = pack(Parameters({}), Codec(), client=3, round=7)
    assert unpack(message, Codec(), limit=LIMIT, client=3, round=7).samples == 0
