"""Clients on disk: the same run, files that come and go with the checkpoints, and no more memory."""

import errno
import json
import shutil

import pytest
import torch

from fdl.build import build
from fdl.errors import UserError
from fdl.state import checkpoint
from fdl.state.client_store import STATE_FILE, DiskStore
from tests.rank_jobs import recipe, run

DISK = ("federation.client_state=disk",)


def state(value):
    return {"specialist": {"weight": torch.full((3,), float(value))}, "seen": value}


def names(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("name", ["federated_distillation", "knowledge", "fedavg"])
def test_a_run_is_the_same_from_disk(name, tmp_path):
    """To the last bit; a client that has no state has no file."""
    memory, disk = run(name, 1, tmp_path / "memory"), run(name, 1, tmp_path / "disk", DISK)
    assert json.dumps(disk) == json.dumps(memory)
    assert bool(names(tmp_path / "disk/clients")) == (name != "fedavg")


def test_nothing_of_a_client_stays_in_memory(tmp_path):
    """After a run all states lie on disk, and are read again when somebody asks."""
    loop = build(recipe("federated_distillation", 1, DISK), tmp_path)
    loop.run()
    assert all(not client.in_memory and not client.cache for client in loop.clients)
    asked = sorted({int(client) for record in loop.history for client in record["clients"]})
    assert {name.split("-")[1] for name in names(tmp_path / "clients")} == {f"{client:06d}" for client in asked}
    one = loop.clients[asked[0]]
    with one.turn():
        assert set(one.state["specialist"]) == set(one.specialist().state_dict())


def test_a_run_goes_on_from_either(tmp_path):
    """From disk to memory and from memory to disk, and from an earlier checkpoint whose files are still there."""
    every = ("federation.rounds=2", "checkpoint.every=1")
    whole = {where: outcome_of(tmp_path / where, (*every, *more)) for where, more in (("disk", DISK), ("memory", ()))}
    assert json.dumps(whole["disk"]) == json.dumps(whole["memory"])
    for first, second in (("disk", ()), ("memory", DISK), ("disk", DISK)):
        folder = tmp_path / f"{first}-{len(second)}"
        shutil.copytree(tmp_path / first, folder)
        newest = checkpoint.files(folder / "checkpoints")[0]
        newest.write_bytes(newest.read_bytes()[:100])  # so that the run goes back to round 1
        assert json.dumps(outcome_of(folder, (*every, *second), True)) == json.dumps(whole["memory"])


def outcome_of(folder, more, resume=False):
    found = run("knowledge", 1, folder, more, resume)
    return {key: found[key] for key in ("student", "communication")}


def test_only_what_a_checkpoint_needs_stays(tmp_path):
    """Superseded files go at once, those of a dropped checkpoint with it; a sweep takes what a killed run left."""
    store = DiskStore(tmp_path / "clients")

    def save(round):
        data = {"clients": {str(c): store.reference(c) for c in (0, 1)}}
        store.mark_checkpointed()
        path = checkpoint.write_round(tmp_path / "checkpoints", round, data, keep=2)
        store.retain(checkpoint.files(path.parent))

    for value in (1, 2):
        store.write(0, state(value))
    store.write(1, state(7))
    assert len(names(store.folder)) == 2
    save(1)
    store.write(0, state(2))  # as it was
    assert len(names(store.folder)) == 2
    for round in (2, 3, 4):
        store.write(0, state(round + 10))
        store.write(0, state(round + 20))
        save(round)
    assert len(names(store.folder)) == 3  # client 1, and client 0 in rounds 3 and 4
    (store.folder / "client-000009-0000000000000000.safetensors").write_bytes(b"left")
    fresh = DiskStore(store.folder)
    fresh.retain(checkpoint.files(tmp_path / "checkpoints"), sweep=True)
    assert len(names(store.folder)) == 3
    fresh.set_reference(0, store.reference(0))
    assert fresh.read(0)["seen"] == 24
    assert torch.equal(fresh.read(0)["specialist"]["weight"], torch.full((3,), 24.0))
    assert fresh.read(5) == {}


def test_a_file_that_is_not_there_is_named(tmp_path):
    """Whose it was, and where it should be."""
    store = DiskStore(tmp_path)
    store.set_reference(3, {STATE_FILE: "../client-000003-0123456789abcdef.safetensors"})
    with pytest.raises(UserError, match=r"client-000003-0123456789abcdef.*client 3") as told:
        store.read(3)
    assert ".." not in str(told.value)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    """One message with the file's name; what was there stays."""
    store = DiskStore(tmp_path)
    store.write(0, state(1))
    before = names(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        store.write(0, state(2))
    assert names(tmp_path) == before and store.read(0)["seen"] == 1
