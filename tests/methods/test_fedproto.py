"""FedProto with a model whose embedding is its answer, h = logits = W x, so that every number can be worked out."""

import math
from dataclasses import replace

import pytest
import torch

from fdl.errors import UserError
from fdl.federation.local_turns import run_local_update
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.methods.fedproto import FedProto
from fdl.methods.single_site import SingleSite
from fdl.modules.output import Output
from fdl.modules.small_classifiers import MLP
from tests.test_loop import outcome
from tests.toy import E0, E1, Linear, federation, samples

SIGMA = 1 / (1 + math.exp(-1))


class Answer(Linear):
    """Its embedding is its logits."""

    def forward(self, x, features=()):
        logits = self.linear(x.flatten(1))
        return Output(logits, logits, {})


def toy(method, folder, **settings):
    """Client 0 holds (1, 0) of class 0, client 1 three times (0, 2) of the same class."""
    loop = federation(method, folder, **settings)
    loop.runtime.factories["linear"] = Answer
    loop.clients[1].train = samples([[0.0, 2.0]] * 3, [0] * 3)
    return loop


def run(method, folder, **settings):
    loop = toy(method, folder, **settings)
    loop.run()
    return loop


# after the first step client 0 answers (½, -½); client 1, whose input is twice as long, has W₁ = (1, -1) and answers
# (2, -2). The common prototype is at ± this much:
COMMON = {"clients": (0.5 + 2) / 2, "samples": (0.5 + 3 * 2) / 4}


@pytest.mark.parametrize("average", COMMON)
def test_prototypes_meet_in_the_middle(tmp_path, average):
    loop = run(FedProto(average=average), tmp_path)
    held = loop.server.state["prototypes"]
    c = COMMON[average]
    torch.testing.assert_close(held["values"], torch.tensor([[c, -c], [0.0, 0.0]]))
    assert held["counts"].tolist() == [{"clients": 2, "samples": 4}[average], 0]
    assert loop.history[0]["metrics"]["prototypes"] == 1
    assert {row.kind for row in loop.ledger.rows()} == {"prototypes"}


@pytest.mark.parametrize("average", COMMON)
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_second_step_is_drawn_to_the_prototype(tmp_path, average, weight):
    loop = run(FedProto(weight, average), tmp_path, rounds=2)
    # MSE over two dimensions: its gradient is h - C
    z = 0.5 - ((SIGMA - 1) + weight * (0.5 - COMMON[average]))
    column = loop.clients[0].state["specialist"]["linear.weight"][:, 0]
    torch.testing.assert_close(column, torch.tensor([z, -z]))
    seen = loop.history[1]["clients"]["0"]
    assert seen["fit/prototype"] == pytest.approx((0.5 - COMMON[average]) ** 2, rel=1e-5)
    assert seen["fit/cross_entropy"] == pytest.approx(-math.log(SIGMA), rel=1e-5)


def test_a_class_of_one_client_has_its_own_mean_and_adds_nothing_new(tmp_path):
    loop = federation(FedProto(weight=5.0), tmp_path)
    loop.runtime.factories["linear"] = Answer
    loop.clients[1].train = samples([E0, E1, E1], [1, 1, 1])
    loop.run()
    # client 0's prototype of class 0 stays what it sent
    torch.testing.assert_close(loop.server.state["prototypes"]["values"][0], torch.tensor([0.5, -0.5]))
    # one step on inputs (1, 0) and twice (0, 1): W = ½ [[-⅓, -⅔], [⅓, ⅔]]; mean answer ½ (⅓·⅓ + ⅔·⅔) = 5/18
    torch.testing.assert_close(loop.server.state["prototypes"]["values"][1], torch.tensor([-5 / 18, 5 / 18]))


def test_without_weight_it_is_local_training(tmp_path):
    settings = {"rounds": 3, "local_training": 3}
    apart, alone = run(FedProto(0.0), tmp_path / "a", **settings), run(SingleSite(), tmp_path / "b", **settings)
    for one, other in zip(apart.clients, alone.clients):
        assert torch.equal(one.state["specialist"]["linear.weight"], other.state["specialist"]["linear.weight"])


def test_classes_without_a_prototype_add_nothing(tmp_path):
    loop = toy(FedProto(1.0), tmp_path)
    loop.run()
    loop.start_round(2)
    loop.clients[0].train = samples([E0, E0], [0, 1])
    objective = loop.method._prototype_objective(loop.clients[0], loop.download_for(0))
    with loop.clients[0].turn():
        module = loop.clients[0].specialist()
        parts = objective(module, loop.clients[0].train.batch(torch.tensor([0, 1])))
    assert parts["prototype"].item() == pytest.approx((0.5 - COMMON["clients"]) ** 2 / 2, rel=1e-5)


def test_a_class_that_nobody_sent_keeps_its_prototype(tmp_path):
    loop = toy(FedProto(), tmp_path)
    loop.run()
    loop.start_round(2)
    aggregate = loop.method.aggregate(loop.server)
    message = run_local_update(loop.method, loop.clients[0], None)
    aggregate.add(replace(message, labels=torch.tensor([1])), 0)
    loop.method.server_update(loop.server, aggregate.result())
    values = loop.server.state["prototypes"]["values"]
    torch.testing.assert_close(values[0], torch.tensor([COMMON["clients"], -COMMON["clients"]]))
    torch.testing.assert_close(values[1], message.values[0])


def test_head_and_nearest_prototype_are_judged_on_held_out_samples(tmp_path):
    loop = toy(FedProto(), tmp_path, rounds=2)
    loop.clients[1].train = samples([[0.0, 2.0]] * 3, [1] * 3)
    # prototypes (½, -½) and (-2, 2): what has a small margin for class 1 at the head lies nearer to that of class 0
    loop.clients[0].calibration = samples([E0, [-0.5, 0.0], [-0.5, 0.0]], [0, 0, 1])
    loop.run()
    assert "held_out/head" not in loop.history[0]["clients"]["0"]
    seen = loop.history[1]["clients"]["0"]
    assert seen["held_out/head"] == pytest.approx(2 / 3)  # right, wrong, right
    assert seen["held_out/nearest_prototype"] == pytest.approx(2 / 3)  # right, right, wrong
    loop.clients[0].calibration = samples([[-0.5, 0.0], [-0.5, 0.0], [-0.5, 0.0]], [0, 0, 1])
    loop.start_round(3)
    run_local_update(loop.method, loop.clients[0], loop.download_for(0))
    seen = loop.clients[0].metrics
    assert (seen["held_out/head"], seen["held_out/nearest_prototype"]) == pytest.approx((1 / 3, 2 / 3))


def test_a_client_answers_with_the_class_of_the_nearest_prototype(tmp_path):
    loop = toy(FedProto(), tmp_path)
    loop.clients[1].train = samples([[0.0, 2.0]] * 3, [1] * 3)
    loop.server.test = samples([E0, [-1.0, 0.0], [-4.0, 0.0]], [0, 0, 1])
    loop.run()
    # prototypes (½, -½) and (-2, 2); W₀ = [[½, 0], [-½, 0]] embeds the test inputs at (½, -½), (-½, ½) and (-2, 2)
    with loop.clients[0].turn():
        model = loop.method.client_model(loop.server, loop.clients[0])
        logits = loop.clients[0].predict(model, loop.server.test)
    centres = torch.tensor([[0.5, -0.5], [-2.0, 2.0]])
    embedded = torch.tensor([[0.5, -0.5], [-0.5, 0.5], [-2.0, 2.0]])
    torch.testing.assert_close(logits, -torch.cdist(embedded, centres).square())
    assert logits.argmax(1).tolist() == [0, 0, 1] and loop.history[0]["clients"]["0"]["test/accuracy"] == 1.0
    head = toy(FedProto(answer="head"), tmp_path / "head")
    head.clients[1].train, head.server.test = loop.clients[1].train, loop.server.test
    head.run()
    assert head.history[0]["clients"]["0"]["test/accuracy"] == pytest.approx(2 / 3)  # the sign of the first input


def test_a_class_without_a_prototype_is_the_last_guess(tmp_path):
    loop = run(FedProto(), tmp_path)  # class 0 alone has one
    with loop.clients[0].turn():
        model = loop.method.client_model(loop.server, loop.clients[0])
        logits = loop.clients[0].predict(model, samples([E0, E1], [0, 1]))
    torch.testing.assert_close(logits[:, 0] - logits[:, 1], torch.full((2,), 30.0))


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    settings = {"rounds": 4, "local_training": 3, "client_fraction": 0.5}
    straight = run(FedProto(), tmp_path / "straight", **settings)
    crashed = toy(FedProto(), tmp_path / "crashed", **settings)
    crashed.rounds = 2
    crashed.run()
    resumed = toy(FedProto(), tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert outcome(resumed) == outcome(straight)


def test_rounds_can_be_estimated(tmp_path):
    loop = toy(FedProto(), tmp_path, rounds=2)
    first, later = estimate_bytes(loop), estimate_bytes(loop, round=2)
    loop.run()
    for round, sizes in ((1, first), (2, later)):
        sent = {(r.direction, r.client): r.bytes for r in loop.ledger.rows() if r.round == round}
        assert {k: v for d in ("down", "up") for k, v in (((d, c), b) for c, b in sizes[d].items()) if v} == sent


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ({"values": torch.zeros(1, 3)}, "expected prototypes [m, 2]"),
        ({"labels": torch.tensor([2])}, "outside of 0 … 1"),
        ({"labels": torch.tensor([-1])}, "outside of 0 … 1"),
        ({"values": torch.zeros(2, 2), "labels": torch.tensor([0, 0]), "counts": torch.tensor([1, 1])}, "several"),
    ],
)
def test_prototypes_that_do_not_fit_are_refused(tmp_path, spoil, reason):
    loop, alone = toy(FedProto(), tmp_path / "a"), toy(FedProto(), tmp_path / "b")
    update = loop.method.local_update

    def bad(client, download):
        message = yield from update(client, download)
        return replace(message, **spoil) if client.id == 1 else message

    loop.method.local_update = bad
    loop.run()
    assert reason in loop.history[0]["refused"]["1"]
    alone.cohort = lambda round: ([0], [])
    alone.run()
    assert torch.equal(loop.server.state["prototypes"]["values"], alone.server.state["prototypes"]["values"])


def test_settings_and_widths_that_make_no_sense(tmp_path):
    with pytest.raises(UserError, match="weight must be"):
        FedProto(weight=-1.0)
    loop = federation(FedProto(), tmp_path)
    for name, hidden in (("linear", [3]), ("wide", [4])):
        loop.runtime.factories[name] = lambda hidden=hidden: MLP(hidden, num_classes=2, input_shape=(2, 1, 1))
    with pytest.raises(UserError, match="one width, got linear 3, wide 4"):
        loop.run()
