import json
import os
import signal
import sys

import pytest
import torch

from fdl.callbacks.base import Callback
from fdl.errors import UserError
from fdl.federation.client_sampling import sample_cohort
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.knowledge.aggregation.server_optimizers import Adam
from fdl.methods.centralized import Centralized
from fdl.methods.distillation import Distillation
from fdl.methods.fedavg import FedAvg
from fdl.methods.feddf import FedDF
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.methods.fedprox import FedProx
from fdl.methods.single_site import SingleSite
from fdl.recipe.config import FederationConfig
from fdl.utils.seeding import numpy_stream
from tests.toy import federation, weight

METHODS = [
    Centralized,
    SingleSite,
    Distillation,
    FedAvg,
    lambda: FedAvg(Adam()),
    FedProx,
    lambda: FedDF(select="last"),
    lambda: FedDF(architectures="specialists", select="last"),
    FederatedDistillation,
    lambda: FederatedDistillation(feedback="student"),
]


class Crash(Callback):
    """Fails at the start of one round, as a killed process would."""

    def __init__(self, round):
        self.at = round

    def on_round_start(self, loop, round):
        if round == self.at:
            raise RuntimeError("crash")


def outcome(loop):
    """All that must not depend on whether a run was interrupted: metrics, bytes and weights."""
    rounds = [{k: v for k, v in record.items() if k != "seconds"} for record in loop.history]
    weights = {} if loop.server.student is None else {"student": weight(loop.server.student).tolist()}
    for client in loop.clients:
        if "specialist" in client.state:
            weights[client.id] = client.state["specialist"]["linear.weight"].tolist()
    return json.dumps([rounds, weights, loop.ledger.by_kind(), [list(row) for row in loop.ledger.rows()]])


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("crash_in", [1, 3])
def test_a_resumed_run_equals_the_straight_one(tmp_path, make, crash_in):
    settings = {"rounds": 4, "local_training": 3, "client_fraction": 0.5, "dropout": 0.2}
    straight = federation(make(), tmp_path / "straight", **settings)
    straight.run()
    crashed = federation(make(), tmp_path / "crashed", callbacks=[Crash(crash_in)], **settings)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = federation(make(), tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert resumed.resumed_from == crash_in - 1
    assert outcome(resumed) == outcome(straight)


def test_resuming_with_other_data_is_refused(tmp_path):
    loop = federation(FedAvg(), tmp_path, rounds=1)
    loop.run()
    other = federation(FedAvg(), tmp_path, rounds=2)
    other.fingerprint = "other"
    with pytest.raises(UserError, match="data"):
        other.run(resume=True)


def test_an_interrupt_finishes_and_saves_the_round(tmp_path):
    class Interrupt(Callback):
        def on_round_start(self, loop, round):
            if round == 2:
                os.kill(os.getpid(), signal.SIGINT)

    loop = federation(FedAvg(), tmp_path / "a", rounds=3, callbacks=[Interrupt()])
    loop.recipe.checkpoint.every = 100
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    resumed = federation(FedAvg(), tmp_path / "a", rounds=3)
    resumed.run(resume=True)
    straight = federation(FedAvg(), tmp_path / "b", rounds=3)
    straight.run()
    assert resumed.resumed_from == 2
    assert outcome(resumed) == outcome(straight)


def test_a_second_interrupt_stops_at_once(tmp_path):
    class Twice(Callback):
        def on_round_start(self, loop, round):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    loop = federation(FedAvg(), tmp_path, rounds=3, callbacks=[Twice()])
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.history == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_cohorts_are_drawn_by_seed_and_round_only(tmp_path):
    loop, other = (federation(FedAvg(), tmp_path, client_fraction=0.5, dropout=0.5, seed=3) for _ in range(2))
    drawn = [loop.cohort(round) for round in range(1, 50)]
    assert drawn == [other.cohort(round) for round in range(1, 50)]
    assert all(len(cohort) == 1 and set(dropped) <= set(cohort) for cohort, dropped in drawn)
    assert {cohort[0] for cohort, _ in drawn} == {0, 1}
    assert 5 < sum(len(dropped) for _, dropped in drawn) < 45


def test_a_cohort_is_that_of_its_own_stream():
    federation = FederationConfig(clients=9, client_fraction=0.5, dropout=0.3)
    for round in (1, 31, 32, 33, 700):
        stream = numpy_stream(7, "cohort", round)
        asked = sorted(stream.choice(9, size=5, replace=False).tolist())
        lost = [client for client, u in zip(asked, stream.random(5)) if u < 0.3]
        for _ in range(2):  # what is returned may be changed
            drawn = sample_cohort(federation, 9, 7, round)
            assert drawn == (asked, lost)
            drawn[0].clear()


def test_who_drops_out_is_sent_to_but_not_heard(tmp_path):
    loop = federation(FedAvg(), tmp_path, rounds=1)
    loop.cohort = lambda round: ([0, 1], [1])
    loop.run()
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[0.5, 0.0], [-0.5, 0.0]]))
    directions = sorted((row.client, row.direction) for row in loop.ledger.rows())
    assert directions == [(0, "down"), (0, "up"), (1, "down")]


def test_a_round_in_which_nobody_is_heard_changes_nothing(tmp_path):
    loop = federation(FedAvg(), tmp_path, rounds=3)
    loop.cohort = lambda round: ([0, 1], [0, 1] if round < 3 else [])
    students = []
    end = loop.run_round
    loop.run_round = lambda round: (end(round), students.append(weight(loop.server.student).clone()))
    loop.run()
    assert torch.equal(students[1], torch.zeros(2, 2)) and not torch.equal(students[2], students[1])
    assert len(loop.history) == 3


def test_a_run_in_which_nobody_was_ever_heard_fails(tmp_path, caplog):
    loop = federation(FedAvg(), tmp_path / "dropped", rounds=2)
    loop.cohort = lambda round: ([0, 1], [0, 1])
    with pytest.raises(UserError, match=r"could be used in any of 2 round.*every client of the cohort dropped out"):
        loop.run()
    loop = federation(FedAvg(), tmp_path / "refused", rounds=2)
    update = loop.method.local_update

    def spoil(client, download):
        message = yield from update(client, download)
        return type(message)({"linear.weight": torch.full((2, 2), float("nan"))}, samples=message.samples)

    loop.method.local_update = spoil
    with pytest.raises(UserError, match=r"4 refused, 4 of them since: .*linear\.weight.* \(clients 0, 1\)"):
        loop.run()
    told = [record.message for record in caplog.records if "could be used" in record.message]
    assert len(told) == 2 and all(text.startswith("round 1: ") for text in told)  # once a streak, for each run


class Diverging(Callback):
    """Counts the rounds that ended."""

    def __init__(self):
        self.ended = []

    def on_round_end(self, loop, record):
        self.ended.append(record["round"])


@pytest.mark.parametrize("make", [Centralized, SingleSite])
def test_a_training_without_messages_that_diverges_ends_with_who_when_and_the_loss(tmp_path, make):
    """Nobody would refuse NaN there: the report would only lack a row."""
    watch = Diverging()
    loop = federation(make(), tmp_path, rounds=5, callbacks=[watch])
    fit, who = loop.runtime.fit, "client 1, round 3" if make is SingleSite else "round 3: the student's"

    def diverging(module, samples, *rest, **more):
        losses = fit(module, samples, *rest, **more)
        if loop.server.round == 3 and samples in (loop.server.pooled, loop.clients[1].train):
            with torch.no_grad():
                next(module.parameters())[0, 0] = float("inf")
            return {"loss": float("nan")}
        return losses

    loop.runtime.fit = diverging
    with pytest.raises(UserError, match=rf"{who}.* diverged.*fit/loss is nan.*local_training\.optimizer"):
        loop.run()
    assert watch.ended == [1, 2]


@pytest.mark.parametrize("harm", ["corrupt", "nan", "shape", "vanish"])
def test_an_unusable_upload_is_refused_and_the_round_goes_on(tmp_path, harm):
    loop = federation(FedAvg(), tmp_path, rounds=1)
    transmit, update = loop.channel.transmit, loop.method.local_update

    def corrupt(data, client, round, direction):
        data = transmit(data, client, round, direction)
        if harm == "corrupt" and client == 1 and direction == "up":
            return data[:-1] + bytes([data[-1] ^ 1])
        return data[: len(data) // 2] if harm == "vanish" and client == 1 and direction == "up" else data

    def spoil(client, download):
        message = yield from update(client, download)
        if client.id == 1 and harm in ("nan", "shape"):
            bad = torch.full((2, 2), float("nan")) if harm == "nan" else torch.zeros(3, 2)
            return type(message)({"linear.weight": bad}, samples=message.samples)
        return message

    loop.channel.transmit, loop.method.local_update = corrupt, spoil
    loop.run()
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[0.5, 0.0], [-0.5, 0.0]]))
    (refused,) = loop.history[0]["refused"].items()
    assert refused[0] == "1" and refused[1]
    assert [(r.round, r.client) for r in loop.ledger.refusals] == [(1, 1)]
    assert sum(row.client == 1 and row.direction == "up" and row.bytes > 0 for row in loop.ledger.rows()) == 1


def test_a_download_that_does_not_arrive_leaves_its_client_out(tmp_path):
    loop = federation(FedAvg(), tmp_path, rounds=1)
    transmit = loop.channel.transmit

    def cut(data, client, round, direction):
        data = transmit(data, client, round, direction)
        return data[:10] if (client, direction) == (1, "down") else data

    loop.channel.transmit = cut
    loop.run()
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[0.5, 0.0], [-0.5, 0.0]]))
    assert list(loop.history[0]["refused"]) == ["1"] and list(loop.history[0]["clients"]) == ["0"]


@pytest.mark.parametrize("make", METHODS)
def test_estimated_bytes_of_a_later_round_are_those_that_are_sent(tmp_path, make):
    loop = federation(make(), tmp_path / "estimate", rounds=2)
    estimate = estimate_bytes(loop, round=2)
    real = federation(make(), tmp_path / "real", rounds=2)
    real.run()
    sent = {d: {0: 0, 1: 0} for d in ("up", "down")}
    for row in real.ledger.rows():
        if row.round == 2:
            sent[row.direction][row.client] += row.bytes
    assert estimate == sent
    loop.run()
    assert outcome(loop) == outcome(real)


@pytest.mark.parametrize("make", METHODS)
def test_estimated_bytes_are_those_of_the_first_round_and_nothing_is_trained(tmp_path, make):
    loop = federation(make(), tmp_path / "estimate")
    estimate = estimate_bytes(loop)
    assert loop.ledger.totals()["upload_bytes"] == 0
    assert all(not client.state for client in loop.clients)
    real = federation(make(), tmp_path / "real")
    real.run()
    sent = {d: {0: 0, 1: 0} for d in ("up", "down")}
    for row in real.ledger.rows():
        if row.direction != "setup":
            sent[row.direction][row.client] += row.bytes
    assert estimate == sent
    loop.run()
    assert outcome(loop) == outcome(real)


def test_the_order_of_turns_does_not_matter(tmp_path):
    forward = federation(FederatedDistillation(), tmp_path / "a", rounds=3)
    backward = federation(FederatedDistillation(), tmp_path / "b", rounds=3)
    backward.cohort = lambda round: ([1, 0], [])
    forward.run()
    backward.run()
    torch.testing.assert_close(weight(forward.server.student), weight(backward.server.student))
    for a, b in zip(forward.clients, backward.clients):
        torch.testing.assert_close(a.state["specialist"]["linear.weight"], b.state["specialist"]["linear.weight"])


def test_errors_of_a_client_name_it(tmp_path):
    loop = federation(FedAvg(), tmp_path)

    def fail(client, download):
        raise ZeroDivisionError("oops")

    loop.method.local_update = fail
    with pytest.raises(ZeroDivisionError) as caught:
        loop.run()
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["while client 0 (linear) in round 1 took its turn"]

    def mistake(client, download):
        raise UserError("too few samples")

    loop = federation(FedAvg(), tmp_path)
    loop.method.local_update = mistake
    with pytest.raises(UserError, match=r"client 0 \(linear\) in round 1: too few samples"):
        loop.run()


def test_transfer_times_add_up_over_rounds(tmp_path):
    from fdl.comm.bandwidth import Bandwidth

    loop = federation(FedAvg(), tmp_path, rounds=3)
    loop.channel.bandwidth = Bandwidth({"bits_per_second": 8000, "latency": 0.5})
    loop.ledger.links = loop.channel.bandwidth.link
    loop.run()
    one = [row.bytes for row in loop.ledger.rows() if row.round == 1 and row.client == 0]
    expected = sum(0.5 + 8 * size / 8000 for size in one)  # two messages, one after the other
    times = [record["communication"]["transfer_s"] for record in loop.history]
    assert times[0] == pytest.approx(expected, rel=0.02)
    assert times[2] == pytest.approx(3 * times[0], rel=0.02)


def test_a_narrow_link_is_on_record(tmp_path):
    from fdl.comm.ledger import Ledger
    from fdl.federation.round_record import add_costs

    ledger = Ledger()
    ledger.add(1, 3, "up", "responses", 50)
    ledger.note(1, 3, "up", "quantize/4", 0.5)
    ledger.note(2, 3, "up", "quantize/2", 0.25)
    record = {"round": 1}
    add_costs(record, ledger, [])
    assert record["codings"] == {"up/3": ["quantize/4", 0.5]}
    assert record["communication"]["upload_bytes"] == 50
