"""The channel: everything is really encoded, counted to the byte, and refused when damaged."""

import gc
import weakref

import pytest
import torch

from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger, LedgerEntry
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import Deflate
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.sparsify import TopK
from fdl.comm.wire import BROADCAST, pack
from fdl.errors import RejectedMessageError, UserError
from fdl.messages import Bundle, Features, Parameters, Responses
from fdl.state import checkpoint
from fdl.utils.seeding import numpy_stream


class Tapped(Channel):
    """Keeps what crosses, and lets a test change it."""

    def __init__(self, *args, change=lambda data, **link: data, **kwargs):
        super().__init__(*args, **kwargs)
        self.change, self.crossed = change, []

    def transmit(self, data, client, round, direction):
        self.crossed.append((client, round, direction, data))
        return self.change(data, client=client, round=round, direction=direction)


def channel(upload=(), download=(), **kwargs):
    return Tapped(Codec(upload), Codec(download), Ledger(), seed=5, **kwargs)


def weights(seed=0, n=40):
    return Parameters({"w": torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))}, samples=3)


def test_upload_is_what_the_bytes_hold_and_counted_to_the_byte():
    link, message = channel([Quantize(4), Deflate()]), weights()
    got = link.upload(message, client=2, round=6)
    [(client, round, direction, data)] = link.crossed
    assert (client, round, direction) == (2, 6, "up")
    assert link.ledger.rows() == [LedgerEntry(6, 2, "up", "parameters", len(data), 1)]
    assert data == pack(message, Codec([Quantize(4), Deflate()]), client=2, round=6)
    error = (got.tensors["w"] - message.tensors["w"]).abs()
    spread = message.tensors["w"].amax(1) - message.tensors["w"].amin(1)
    assert 0 < error.max() <= (spread / 30).max() * (1 + 1 / 64)
    assert got.samples == 3


def test_directions_have_their_own_chains():
    link, message = channel(upload=[Quantize(1)]), weights()
    assert torch.equal(link.download(message, 0, 1).tensors["w"], message.tensors["w"])
    assert not torch.equal(link.upload(message, 0, 1).tensors["w"], message.tensors["w"])


def test_nothing_is_nothing():
    link = channel()
    assert link.upload(None, 0, 1) is None
    assert link.download(None, 0, 1) is None
    assert link.ledger.rows() == []


def test_broadcast_is_encoded_once_a_round_and_counted_for_each_client():
    link, message = channel(download=[Quantize(8, "stochastic")]), weights()
    received = [link.download(message, client, 1) for client in (4, 0, 9)]
    assert received[0] is received[1] is received[2]
    assert received[0] is not message
    data = {crossed[3] for crossed in link.crossed}
    size = len(data.pop())
    assert not data
    assert link.ledger.rows() == [LedgerEntry(1, client, "down", "parameters", size, 1) for client in (0, 4, 9)]
    again = link.download(message, 4, 2)
    assert again is not received[0]
    assert not torch.equal(again.tensors["w"], received[0].tensors["w"])  # other rounding noise in another round
    # two messages that take turns, as for two groups of clients, are each encoded once
    other = weights(1)
    turns = [link.download(m, client, 2) for client, m in enumerate((message, other) * 3)]
    assert len({id(m) for m in turns}) == 2


def test_messages_to_single_clients_are_not_kept():
    link = channel()
    message = weights()
    decoded = link.download(message, 0, 1)
    watch, watch_decoded = weakref.ref(message), weakref.ref(decoded)
    del message, decoded
    gc.collect()
    assert watch() is None
    assert watch_decoded() is None


def test_decoded_tensors_do_not_share_memory_with_the_sender():
    link, message = channel(), weights()
    link.download(message, 0, 1).tensors["w"].zero_()
    link.upload(message, 0, 1).tensors["w"].zero_()
    assert message.tensors["w"].abs().sum() > 0


def test_rounding_noise_depends_on_round_client_and_direction_only():
    chain = [Quantize(2, "stochastic")]
    message = weights()
    straight, reordered = channel(chain, chain), channel(chain, chain)
    a = {(c, r): straight.upload(message, c, r).tensors["w"] for r in (1, 2) for c in (0, 1)}
    b = {(c, r): reordered.upload(message, c, r).tensors["w"] for c in (1, 0) for r in (2, 1)}
    assert all(torch.equal(a[key], b[key]) for key in a)
    different = [*a.values(), straight.download(message, 0, 1).tensors["w"]]
    assert not any(torch.equal(x, y) for i, x in enumerate(different) for y in different[:i])
    assert straight.crossed[0][3] == pack(
        message, Codec(chain), client=0, round=1, rng=numpy_stream(5, "codec/up", 1, 0)
    )
    assert straight.crossed[-1][3] == pack(
        message, Codec(chain), client=BROADCAST, round=1, rng=numpy_stream(5, "codec/down", 1, -1)
    )


def flip(data, **link):
    return data[:50] + bytes([data[50] ^ 4]) + data[51:]


def test_damage_on_the_way_is_refused_and_counted():
    link = channel(change=flip)
    for send in (link.upload, link.download):
        with pytest.raises(RejectedMessageError, match="checksum"):
            send(weights(), 1, 2)
    assert link.ledger.totals() == {
        "upload_bytes": len(link.crossed[0][3]),
        "download_bytes": len(link.crossed[1][3]),
        "setup_bytes": 0,
    }


def test_damage_on_the_way_to_one_client_does_not_reach_another():
    message = weights()
    link = channel(change=lambda data, client, **rest: flip(data) if client in (0, 2) else data)
    outcomes = []
    for client in range(4):
        try:
            outcomes.append(torch.equal(link.download(message, client, 1).tensors["w"], message.tensors["w"]))
        except RejectedMessageError:
            outcomes.append("refused")
    assert outcomes == ["refused", True, "refused", True]
    assert len(link.ledger.rows()) == 4


def test_a_message_of_another_client_round_or_direction_is_refused():
    message = weights()
    replays = {
        "client 1": pack(message, Codec(), client=1, round=3),
        "round 2": pack(message, Codec(), client=0, round=2),
        "the server to all": pack(message, Codec(), client=BROADCAST, round=3),
    }
    for name, data in replays.items():
        link = channel(change=lambda _, data=data, **rest: data)
        with pytest.raises(RejectedMessageError, match=name):
            link.upload(message, client=0, round=3)


def test_unusable_messages_are_refused():
    link = channel([Quantize(8)])
    with pytest.raises(RejectedMessageError, match="not finite"):
        link.upload(Parameters({"w": torch.full((5, 20), float("nan"))}), 0, 1)
    with pytest.raises(RejectedMessageError, match="must be a matrix"):
        link.upload(Responses(torch.rand(4), "logits"), 0, 1)
    with pytest.raises(RejectedMessageError, match="beyond the limit of 1599 bytes"):
        channel(limit=1599).upload(weights(), 0, 1)
    assert channel(limit=1600).upload(weights(), 0, 1).samples == 3
    assert link.ledger.by_kind() == {  # they were sent, so they count
        "up/parameters": len(link.crossed[0][3]),
        "up/responses": len(link.crossed[1][3]),
    }


def test_setup_costs_have_their_own_account():
    link = channel()
    link.setup_cost("encoder", 12_345, client=1)
    assert link.ledger.rows() == [LedgerEntry(0, 1, "setup", "encoder", 12_345, 1)]
    assert link.ledger.totals() == {"upload_bytes": 0, "download_bytes": 0, "setup_bytes": 12_345}


def test_bad_limit():
    with pytest.raises(UserError, match="limit must be at least 1 byte, got 0"):
        channel(limit=0)


REMEMBERING = [Delta(), Quantize(4)]


def test_chains_that_remember_give_each_client_its_own_past():
    link = channel(download=REMEMBERING)
    first, second = weights(0), weights(1)
    for client in (0, 1):
        link.download(first, client, 1)
    link.download(second, 0, 2)  # client 1 sits this round out
    got = {client: link.download(second, client, 3).tensors["w"] for client in (0, 1)}
    error = {client: (w - second.tensors["w"]).abs().max() for client, w in got.items()}
    assert error[0] < 0.1 * error[1]  # its second message of the same tells what the first one lost
    addresses = {(client, round): data[9:13] for client, round, _, data in link.crossed}
    assert addresses[0, 1] == bytes(4)
    assert addresses[1, 1] == bytes([1, 0, 0, 0])


def test_a_lost_or_damaged_message_leaves_both_ends_in_step():
    damaged = set()
    link = channel(REMEMBERING, change=lambda data, round, **rest: flip(data) if round in damaged else data)
    spared = channel(REMEMBERING)
    for round in range(1, 8):
        message = weights(round // 3)
        if round in (1, 3, 4):
            damaged.add(round)
            with pytest.raises(RejectedMessageError, match="checksum"):
                link.upload(message, 0, round)
        else:
            got = link.upload(message, 0, round)
            assert torch.equal(got.tensors["w"], spared.upload(message, 0, round).tensors["w"])
            assert (got.tensors["w"] - message.tensors["w"]).abs().max() < 0.3


def test_a_message_that_is_not_usable_is_not_remembered():
    link = channel(REMEMBERING)
    link.upload(weights(0), 0, 1)
    before = checkpoint.to_bytes(link.state_dict())
    with pytest.raises(RejectedMessageError, match="not finite"):
        link.upload(Parameters({"w": torch.full((40, 10), float("nan"))}), 0, 2)
    assert checkpoint.to_bytes(link.state_dict()) == before
    assert link.upload(weights(0), 0, 3) is not None


def test_what_its_receiver_does_not_confirm_is_not_remembered():
    chain = [TopK(0.25, error_feedback=True)]
    link, spared = channel(chain), channel(chain)
    for round in range(1, 9):
        message = weights(round)
        with link.unconfirmed():
            got = link.upload(message, 0, round)
            before = checkpoint.to_bytes(link.state_dict())
            if round in (1, 4, 5):
                continue
            link.confirm(0)
            assert checkpoint.to_bytes(link.state_dict()) != before
        assert torch.equal(got.tensors["w"], spared.upload(message, 0, round).tensors["w"])
    link.confirm(0)  # nothing waits any more
    assert checkpoint.to_bytes(link.state_dict()) == checkpoint.to_bytes(spared.state_dict())


def test_parts_of_a_bundle_are_packed_counted_and_remembered_by_kind():
    link = channel([Delta()])
    answers = Responses(torch.rand(40, 10), "logits")
    features = Features({"a": torch.rand(40, 10)})
    for round in (1, 2):
        got = link.upload(Bundle((answers, features)), 0, round)
        assert [part.kind for part in got.parts] == ["responses", "features"]
        assert torch.allclose(got.parts[0].values, answers.values)
        assert torch.allclose(got.parts[1].layers["a"], features.layers["a"])
    assert link.ledger.by_kind().keys() == {"up/responses", "up/features"}
    assert link.state_dict().keys() == {"up/0/responses", "up/0/features"}


def test_resume_is_exact():
    chain = [Delta(), Quantize(4, "stochastic", schedule=[(3, 2)])]
    straight, resumed = channel(chain, chain), channel(chain, chain)
    for round in range(1, 6):
        for client in (0, 3):
            for send in ("upload", "download"):
                a, b = (getattr(link, send)(weights(round), client, round) for link in (straight, resumed))
                assert torch.equal(a.tensors["w"], b.tensors["w"])
        state = checkpoint.from_bytes(checkpoint.to_bytes({"channel": resumed.state_dict()}))["channel"]
        resumed = channel(chain, chain)
        resumed.load_state_dict(state)
    assert channel().state_dict() == {}
