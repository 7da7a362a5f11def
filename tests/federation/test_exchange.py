"""A round's messages, with nothing around them but a channel and two toy clients."""

import pytest

from fdl.errors import RejectedMessageError, UserError
from fdl.federation.exchange import RoundExchange
from fdl.knowledge.aggregation.base import Aggregate
from fdl.methods.fedavg import FedAvg
from tests.toy import federation


class Total(Aggregate):
    """An aggregate that counts what it takes, and rejects one client's uploads."""

    def __init__(self, rejects=()):
        self.rejects, self.taken = rejects, []

    def add(self, message, client):
        if client in self.rejects:
            raise RejectedMessageError("not wanted")
        self.taken.append(client)

    def result(self):
        return self.taken or None


@pytest.fixture
def loop(tmp_path):
    loop = federation(FedAvg(), tmp_path)
    loop.start_round(1)
    loop.method.setup(loop.server, loop.clients)
    return loop


def exchange(loop, dropped=()):
    record = {"round": 1, "cohort": [0, 1], "dropped": list(dropped), "refused": {}, "clients": {}}
    return RoundExchange(loop.method, record, loop.channel, loop.placement, loop.adversaries, loop.seconds), record


def collect(loop, one, aggregate):
    ended = []
    turns = loop.executor(loop.method, one.broadcast([0, 1], loop.download_for))
    with loop.channel.unconfirmed():
        one.collect(turns, aggregate, lambda client, metrics: ended.append((client, metrics)))
    return ended


def test_every_client_gets_its_download_and_its_upload_is_added(loop):
    one, record = exchange(loop)
    total = Total()
    ended = collect(loop, one, total)
    assert total.result() == [0, 1] and [client for client, _ in ended] == [0, 1]
    assert record["clients"] == {"0": ended[0][1], "1": ended[1][1]} and record["refused"] == {}
    assert [row.direction for row in loop.ledger.of_round(1)].count("up") == 2


def test_a_client_that_drops_out_is_sent_its_download_and_takes_no_turn(loop):
    one, record = exchange(loop, dropped=[1])
    total = Total()
    collect(loop, one, total)
    sent = {(row.client, row.direction) for row in loop.ledger.of_round(1)}
    assert total.result() == [0] and list(record["clients"]) == ["0"]
    assert sent == {(0, "down"), (0, "up"), (1, "down")}


def test_a_download_that_cannot_be_used_is_rejected_and_its_client_does_not_upload(loop):
    one, record = exchange(loop)

    def download(client):
        if client == 0:
            raise RejectedMessageError("lost")
        return loop.download_for(client)

    assert [client.id for client, _ in one.broadcast([0, 1], download)] == [1]
    assert record["refused"] == {"0": "lost"} == {str(r.client): r.reason for r in loop.ledger.refusals}


def test_an_upload_that_the_aggregate_rejects_is_counted_and_the_round_goes_on(loop):
    one, record = exchange(loop)
    total = Total(rejects=(0,))
    ended = collect(loop, one, total)
    assert total.result() == [1] and record["refused"] == {"0": "not wanted"} and len(ended) == 2
    assert [row.direction for row in loop.ledger.of_round(1)].count("up") == 2  # it was sent all the same


def test_an_error_in_a_turn_ends_the_round(loop):
    one, _ = exchange(loop)

    def turns():
        yield loop.clients[0], None
        raise UserError("client 1 is out of memory")

    with pytest.raises(UserError, match="client 1 is out of memory"):
        one.collect(turns(), Total(), lambda *_: None)
