import errno
import os

import pytest
import torch

from fdl.errors import UserError
from fdl.state import checkpoint

STATE = {
    "round": 3,
    "server": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7), "empty": torch.zeros(0, 4)},
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "history": [{"accuracy": 0.1 + 0.2, "lost": float("nan")}, {"dropped": [1, 2], "note": "ü", "ok": True}],
    "stopped": None,
}


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right):
            assert_same(a, b)
    else:
        assert left == right or (left != left and right != right)


def test_state_returns_bit_for_bit(tmp_path):
    path = checkpoint.write_round(tmp_path, 3, STATE)
    state, read, damaged = checkpoint.load_newest(tmp_path)
    assert_same(state, STATE)
    assert read == path and damaged == []


def test_tied_and_overlapping_tensors_survive():
    base = torch.arange(8.0)
    state = {"a": base, "b": base, "slice": base[2:4], "column": torch.arange(6.0).reshape(3, 2)[:, 1]}
    data = checkpoint.to_bytes(state)
    assert_same(checkpoint.from_bytes(data), state)
    assert data.count(torch.arange(8.0).numpy().tobytes()) == 1 + 0  # the tied tensor is stored once


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, harm):
    checkpoint.write_round(tmp_path, 1, {"round": 1})
    newest = checkpoint.write_round(tmp_path, 2, {"round": 2})
    data = bytearray(newest.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
    newest.write_bytes({"truncate": data[: len(data) // 2], "flip": data, "empty": b""}[harm])
    state, _, damaged = checkpoint.load_newest(tmp_path)
    assert state["round"] == 1
    assert len(damaged) == 1 and str(newest) in damaged[0]


def test_no_checkpoint_and_only_damaged_ones_are_errors(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load_newest(tmp_path / "absent")
    path = checkpoint.write_round(tmp_path, 1, {"round": 1})
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_newest(tmp_path)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    for round in range(12):
        checkpoint.write_round(tmp_path, round, {"round": round}, keep=2)
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.iterdir()) == [10, 11]


def test_full_disk_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch):
    checkpoint.write_round(tmp_path, 1, {"round": 1})

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"round-000002-.*: cannot be written: No space left"):
        checkpoint.write_round(tmp_path, 2, {"round": 2})
    assert len(list(tmp_path.iterdir())) == 1
    assert checkpoint.load_newest(tmp_path)[0]["round"] == 1


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {3}}])
def test_what_cannot_be_stored_is_named(value):
    with pytest.raises(TypeError, match="state"):
        checkpoint.to_bytes({"state": value})
