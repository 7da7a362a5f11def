"""Tags: by hand, and every way to forge, replay, redirect or change a message."""

import hashlib
import os
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.build import build
from fdl.comm import authentication
from fdl.comm.authentication import KEY, TAG, Authentication
from fdl.comm.bandwidth import Bandwidth
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.quantize import Quantize
from fdl.comm.wire import pack
from fdl.errors import RecipeError, RejectedMessageError, UserError
from fdl.messages import Bundle, Features, Parameters, Responses
from fdl.recipe import from_mapping
from tests.toy import federation

KEYS = authentication.simulated_keys(7)


class Link(Channel):
    """A link in the hands of somebody else: keeps what crosses, and sends on what `change` makes of it."""

    def __init__(self, upload=(), download=(), key=KEYS, run="a", **kwargs):
        checks = None if key is None else Authentication(key, run)
        super().__init__(Codec(upload), Codec(download), Ledger(), seed=5, authentication=checks, **kwargs)
        self.crossed, self.change = [], lambda data: data

    def transmit(self, data, client, round, direction):
        self.crossed.append(data)
        return self.change(data)


def weights(seed=0, n=6):
    return Parameters({"w": torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))}, samples=3)


def test_a_tag_by_hand():
    link = Link(run="name/3")
    link.upload(weights(), client=2, round=6)
    [sealed] = link.crossed
    message = pack(weights(), Codec(), client=2, round=6)
    key = hashlib.blake2b(b"7/key/2", digest_size=32).digest()
    text = b"u" + struct.pack("<II", 2, 6) + hashlib.blake2b(b"name/3", digest_size=16).digest()
    text += hashlib.blake2b(message, digest_size=32).digest()
    assert sealed == message + hashlib.blake2b(text, key=key, digest_size=16).digest()
    assert link.ledger.totals()["upload_bytes"] == len(message) + TAG


def test_one_message_for_all_is_encoded_and_hashed_once_and_tagged_for_each(monkeypatch):
    hashed = []
    monkeypatch.setattr("fdl.comm.channel.digest", lambda data: hashed.append(data) or authentication.digest(data))
    link, message = Link(), weights()
    received = [link.download(message, client, 1) for client in range(5)]
    assert all(one is received[0] for one in received)
    assert len(hashed) == 1
    assert len({data[:-TAG] for data in link.crossed}) == 1
    assert len({data[-TAG:] for data in link.crossed}) == 5


def test_keys_of_clients_and_runs_differ():
    keys = {authentication.simulated_keys(seed)(client) for seed in (0, 1) for client in range(50)}
    assert len(keys) == 100 and {len(key) for key in keys} == {KEY}


SIZE = len(pack(weights(), Codec(), client=0, round=2)) + TAG


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, SIZE - 1), bit=st.integers(0, 7), cut=st.integers(0, SIZE - 1), tail=st.binary(min_size=1))
def test_every_flipped_bit_cut_and_tail_is_refused_and_counted(place, bit, cut, tail):
    flipped = lambda data: data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]  # noqa: E731
    for change in (flipped, lambda data: data[:cut], lambda data: data + tail):
        link = Link()
        link.change = change
        for send in (link.upload, link.download):
            with pytest.raises(RejectedMessageError, match=r"not authentic: was not sent by .*client 0 in round 2"):
                send(weights(), 0, 2)
        assert link.ledger.totals()["upload_bytes"] == link.ledger.totals()["download_bytes"] == SIZE


PLACES = st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(["upload", "download"]), st.sampled_from("ab"))


@settings(max_examples=80, deadline=None)
@given(true=PLACES, due=PLACES)
def test_a_message_counts_for_its_client_round_direction_and_run_only(true, due):
    """Impersonation, replay, reflection, a message of another run; `delta` lets a download name its client."""
    taken = Link(download=[Delta()], run=true[3])
    getattr(taken, true[2])(weights(), *true[:2])
    link = Link(download=[Delta()], run=due[3])
    link.change = lambda data: taken.crossed[0]
    if true == due:
        assert torch.equal(getattr(link, due[2])(weights(), *due[:2]).tensors["w"], weights().tensors["w"])
    else:
        with pytest.raises(RejectedMessageError, match=f"client {due[0]} in round {due[1]}"):
            getattr(link, due[2])(weights(), *due[:2])


@settings(max_examples=60, deadline=None)
@given(client=st.integers(0, 3), other=st.integers(0, 3), direction=st.sampled_from("ud"), tag=st.binary(max_size=20))
def test_who_lacks_the_key_cannot_forge_by_computing_the_checksum(client, other, direction, tag):
    """Neither with any tag, nor with that of a client whose key has leaked."""
    body = pack(weights(9), Codec(), client=client, round=1)
    assert body[4:8] == struct.pack("<I", zlib.crc32(body[8:]))
    leaked = Authentication(KEYS, "a").tag(authentication.digest(body), other, 1, "up")
    for forged in [tag, *([leaked] if other != client else [])]:
        link = Link()
        link.change = lambda data, forged=forged: body + forged
        with pytest.raises(RejectedMessageError, match="not authentic"):
            link.upload(weights(), client, 1)
    plain = Link(key=None)  # what the checksum alone would let through
    plain.change = lambda data: body
    assert torch.equal(plain.upload(weights(), client, 1).tensors["w"], weights(9).tensors["w"])


def test_a_part_played_twice_is_refused():
    for key in (None, KEYS):
        link = Link(key=key)
        link.change = lambda data, link=link: link.crossed[0]
        with pytest.raises(RejectedMessageError, match="two parts of one type"):
            link.upload(Bundle((Responses(torch.rand(4, 3), "logits"), Features({"a": torch.rand(4, 3)}))), 0, 1)


def test_a_bundle_is_remembered_as_a_whole_or_not_at_all():
    """The last part breaks off: the next bundle is coded as if this one had never been sent."""
    parts = [Bundle((Responses(torch.rand(9, 3), "logits"), Features({"a": torch.rand(9, 3)}))) for _ in range(3)]
    link, spared = (Link(upload=[Delta(), Quantize(4)]) for _ in range(2))
    for round, bundle in enumerate(parts, 1):
        if round == 2:
            link.change = lambda data, link=link: data if len(link.crossed) % 2 else data[:-1]
            with pytest.raises(RejectedMessageError):
                link.upload(bundle, 0, round)
            link.change = lambda data: data
            continue
        got, expected = link.upload(bundle, 0, round), spared.upload(bundle, 0, round)
        assert torch.equal(got.parts[0].values, expected.parts[0].values)
        assert torch.equal(got.parts[1].layers["a"], expected.parts[1].layers["a"])


def test_a_tag_counts_towards_a_narrow_link():
    size = len(pack(weights(), Codec(), client=0, round=1))
    for room, codings in ((size + TAG, []), (size + TAG - 1, ["changed"])):
        link = Link(bandwidth=Bandwidth({"upload": {"bytes_per_round": room}}))
        link.upload(weights(), 0, 1)
        assert len(link.ledger.notes) == len(codings)
        assert link.ledger.totals()["upload_bytes"] <= room


def test_the_loop_counts_an_impersonated_upload_under_its_client(tmp_path):
    from fdl.methods.fedavg import FedAvg

    loop = federation(FedAvg(), tmp_path, rounds=2)
    loop.channel._authentication = Authentication(KEYS)
    seen = {}

    def replay(data, client, round, direction):
        seen[client, round, direction] = data
        return seen[1, 1, "up"] if (client, round, direction) == (1, 2, "up") else data

    loop.channel.transmit = replay
    loop.run()
    assert [record["refused"].keys() for record in loop.history] == [set(), {"1"}]
    assert "not authentic" in loop.history[1]["refused"]["1"]
    assert [(refusal.round, refusal.client) for refusal in loop.ledger.refusals] == [(2, 1)]
    assert sum(row.bytes for row in loop.ledger.rows()) == sum(map(len, seen.values()))


# --- keys


RECIPE = {
    "name": "small",
    "method": "fedavg",
    "data": {"target": "digits", "args": {"proxy": 0, "validation": 0, "test": 1700}},
    "federation": {"clients": 3},
    "student": {"target": "mlp", "args": {"hidden": [4]}},
    "fabric": {"accelerator": "cpu"},
    "callbacks": [],
}


def test_keys_from_a_file(tmp_path):
    path = tmp_path / "keys"
    authentication.write_keys(path, 3)
    assert path.stat().st_mode & 0o777 == 0o600
    key = authentication.read_keys(path, range(3))
    assert len({key(client) for client in range(3)}) == 3
    link, other = Link(key=key), Link()
    link.upload(weights(), 1, 1)
    other.change = lambda data: link.crossed[0]
    with pytest.raises(RejectedMessageError, match="not authentic"):
        other.upload(weights(), 1, 1)
    with pytest.raises(UserError, match="keys cannot be written: File exists"):
        authentication.write_keys(path, 3)
    with pytest.raises(UserError, match="no key for client 3, 4"):
        authentication.read_keys(path, range(5))


def test_unusable_keys_are_named_without_showing_them(tmp_path):
    secret = "ab" * KEY
    cases = [
        (f"0 {secret}\n0 {'cd' * KEY}\n", "line 2: client 0 has a key already"),
        (f"0 {secret}\n\n1 {secret}  # the same\n", "line 3: this is another client's key"),
        (f"0 {secret[:-2]}\n", "line 1: expected a client's id and 64 hexadecimal digits"),
        (f"zero {secret}\n", "line 1"),
        (f"0 {secret[:-1]}g\n", "line 1"),
        (f"0 {secret} {secret}\n", "line 1"),
        ("ü\n", "cannot be read"),
    ]
    path = tmp_path / "keys"
    for text, reason in cases:
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        with pytest.raises(UserError, match=reason) as caught:
            authentication.read_keys(path)
        assert secret[:-2] not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        authentication.read_keys(tmp_path / "absent")


@pytest.mark.skipif(os.name != "posix", reason="only POSIX files say who may read them")
def test_keys_that_others_can_read_are_refused(tmp_path):
    path = tmp_path / "keys"
    authentication.write_keys(path, 1)
    path.chmod(0o640)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        authentication.read_keys(path)


def test_recipes_authenticate_when_they_say_so_or_name_keys(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    authentication.write_keys(path, 3)
    monkeypatch.setenv("FDL_KEYS", str(path))
    sent = {}
    for name, channel in (
        ("off", {}),
        ("simulated", {"authenticate": True}),
        ("deployed", {"keys": "${oc.env:FDL_KEYS}"}),
    ):
        loop = build(from_mapping({**RECIPE, "channel": channel}), tmp_path / name)
        loop.run()
        sent[name] = loop.ledger.totals()
    for direction in ("upload_bytes", "download_bytes"):
        assert sent["simulated"][direction] == sent["deployed"][direction] == sent["off"][direction] + 3 * TAG

    with pytest.raises(UserError, match=rf"channel\.keys: {path}: no key for client 3"):
        build(from_mapping({**RECIPE, "channel": {"keys": str(path)}, "federation": {"clients": 4}}), tmp_path)
    with pytest.raises(RecipeError, match=r"channel\.keys: is not used: channel\.authenticate is false"):
        from_mapping({**RECIPE, "channel": {"authenticate": False, "keys": str(path)}})
