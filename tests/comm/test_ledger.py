"""Sums against a plain count, and a state that survives JSON."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fdl.comm.ledger
from fdl.comm.ledger import Ledger, LedgerEntry, RejectedMessage

ENTRIES = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 5),
        st.sampled_from(["up", "down", "setup"]),
        st.sampled_from(["parameters", "responses"]),
        st.integers(0, 2**40),
    ),
    max_size=40,
)


def test_by_hand():
    ledger = Ledger()
    ledger.add(0, 1, "setup", "encoder", 1000)
    ledger.add(1, 0, "down", "parameters", 70)
    ledger.add(1, 1, "down", "parameters", 70)
    ledger.add(1, 1, "up", "responses", 40)
    ledger.add(2, 1, "up", "responses", 41)
    ledger.add(2, 1, "up", "responses", 41)
    ledger.add(0, 0, "setup", "encoder", 1000)
    ledger.reject(2, 1, "not finite")
    assert ledger.totals() == {"upload_bytes": 122, "download_bytes": 140, "setup_bytes": 2000}
    assert ledger.by_kind() == {"setup/encoder": 2000, "down/parameters": 140, "up/responses": 122}
    assert ledger.by_client() == {
        0: {"up": 0, "down": 70, "setup": 1000},
        1: {"up": 122, "down": 70, "setup": 1000},
    }
    assert ledger.rows() == [
        LedgerEntry(0, 0, "setup", "encoder", 1000, 1),
        LedgerEntry(0, 1, "setup", "encoder", 1000, 1),
        LedgerEntry(1, 0, "down", "parameters", 70, 1),
        LedgerEntry(1, 1, "down", "parameters", 70, 1),
        LedgerEntry(1, 1, "up", "responses", 40, 1),
        LedgerEntry(2, 1, "up", "responses", 82, 2),
    ]
    assert ledger.refusals == [RejectedMessage(2, 1, "not finite")]


def test_empty():
    assert Ledger().totals() == {"upload_bytes": 0, "download_bytes": 0, "setup_bytes": 0}
    assert Ledger().rows() == []
    assert Ledger().by_client() == {}


@settings(max_examples=100, deadline=None)
@given(entries=ENTRIES, split=st.integers(0, 40), unpacked=st.sampled_from([0, 3, 1000]))
def test_counts_like_a_counter_also_across_a_checkpoint(entries, split, unpacked):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fdl.comm.ledger, "_UNPACKED", unpacked)
        check_counts(entries, split)


def check_counts(entries, split):
    ledger = Ledger()
    straight = Ledger()
    sizes, messages = Counter(), Counter()
    for index, (*key, nbytes) in enumerate(entries):
        if index == split:
            state = json.loads(json.dumps(ledger.state_dict()))
            ledger = Ledger()
            ledger.add(9, 9, "up", "stale", 1)
            ledger.load_state_dict(state)
        ledger.add(*key, nbytes)
        straight.add(*key, nbytes)
        sizes[tuple(key)] += nbytes
        messages[tuple(key)] += 1
    rows = ledger.rows()
    assert {row[:4]: row.bytes for row in rows} == dict(sizes)
    assert {row[:4]: row.messages for row in rows} == dict(messages)
    assert len(rows) == len(sizes)
    assert rows == sorted(rows, key=lambda row: row[:2])
    for name, direction in (("upload_bytes", "up"), ("download_bytes", "down"), ("setup_bytes", "setup")):
        assert ledger.totals()[name] == sum(n for key, n in sizes.items() if key[2] == direction)
    by_kind = Counter()
    for (_, _, direction, kind), nbytes in sizes.items():
        by_kind[f"{direction}/{kind}"] += nbytes
    assert ledger.by_kind() == dict(by_kind)
    assert sum(sum(of.values()) for of in ledger.by_client().values()) == sum(sizes.values())
    assert json.dumps(ledger.state_dict()) == json.dumps(straight.state_dict())


def test_state_leaves_the_ledger_as_it_was():
    ledger = Ledger()
    ledger.add(3, 0, "up", "responses", 10)
    ledger.state_dict()
    ledger.add(3, 0, "up", "responses", 10)
    assert ledger.rows() == [LedgerEntry(3, 0, "up", "responses", 20, 2)]


def test_stays_small_with_thousands_of_clients():
    ledger, rng = Ledger(), np.random.default_rng(0)
    for round in range(1, 5):
        for client, size in enumerate(rng.integers(6000, 6400, 5000).tolist()):
            ledger.add(round, client, "down", "responses", 5000)
            ledger.add(round, client, "up", "responses", size)
    rows = len(ledger.rows())
    assert rows == 4 * 2 * 5000
    assert len(json.dumps(ledger.state_dict())) < 5 * rows


def test_long_reasons_are_cut_and_directions_checked():
    ledger = Ledger()
    ledger.reject(1, 0, "x" * 10_000)
    assert len(ledger.refusals[0].reason) == 300
    with pytest.raises(ValueError, match="direction must be one of up, down, setup, got 'sideways'"):
        ledger.add(1, 0, "sideways", "responses", 1)
