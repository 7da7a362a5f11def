"""Rehearsal on public data, on the toy federation and against the formula."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdl.build import build
from fdl.datamodules.arrivals import ClassIncremental, DomainIncremental
from fdl.errors import RejectedMessageError, UserError
from fdl.messages import Parameters, Responses, parts_of
from fdl.methods.cfed import CFeD
from fdl.methods.fedavg import FedAvg
from fdl.modules.output import Output
from fdl.recipe import load
from fdl.robust.coordinate_wise import Median
from tests.recipes.test_recipes import ROOT
from tests.toy import federation, weight


def staged(method, folder, rounds=3, local_training=2, **settings):
    """A loop whose second stage begins in round 2, with the same data in both."""
    loop = federation(method, folder, rounds=rounds, local_training=local_training, **settings)
    for participant in (loop.server, *loop.clients):
        participant.arrival = DomainIncremental(["a", "b"], rounds=1)
    return loop


def test_what_the_first_stage_left_is_noted_once_and_sent_to_all(tmp_path):
    loop = staged(CFeD(reviewers=0), tmp_path)
    loop.set_up()
    loop.run_round(1)
    assert all(row.kind in ("parameters", "proxy") for row in loop.ledger.rows())
    expected = weight(loop.server.student).T.clone()  # the proxy set is the unit matrix
    for round in (2, 3):
        loop.start_round(round)
        parts = parts_of(loop.method.download(loop.server, 0))
        assert parts.keys() == {Parameters, Responses}
        torch.testing.assert_close(parts[Responses].values, expected)
        assert torch.equal(parts[Parameters].tensors["linear.weight"], weight(loop.server.student))
        loop.run_round(round)
    assert not torch.allclose(weight(loop.server.student).T, expected)


def test_a_client_s_loss_is_the_formula_over_the_classes_known_before(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(2, 4)

        def forward(self, x):
            return Output(self.linear(x), x, {})

    client = federation(FedAvg(), tmp_path).clients[1]
    client.arrival, client.num_classes, client.stage = ClassIncremental(2, order=[2, 0, 1, 3]), 4, 1
    previous, module = torch.tensor([[1.0, 5.0, 2.0, 4.0], [0.0, 7.0, 3.0, 1.0]]), Wide()
    batch = client.train.batch(torch.arange(3))
    got = CFeD(weight=3.0, temperature=2.0)._rehearsal_objective(client, previous)(module, batch)
    rows = torch.randint(2, (3,), generator=client.rng("rehearse"))
    known = torch.tensor([0, 2])
    ours = F.log_softmax(module.linear(client.proxy.batch(rows)[0])[:, known] / 2, dim=1)
    soft = 4 * F.kl_div(ours, F.softmax(previous[rows][:, known] / 2, dim=1), reduction="batchmean")
    hard = F.cross_entropy(module.linear(batch[0]), batch[1])
    torch.testing.assert_close(got["loss"], hard + 3 * soft)
    torch.testing.assert_close(got["distillation"], soft.detach())


def test_without_weight_it_is_fedavg_and_with_it_not_before_the_second_stage(tmp_path):
    plain = staged(FedAvg(), tmp_path / "fedavg")
    off = staged(CFeD(weight=0, server_distillation=False), tmp_path / "off")
    on = staged(CFeD(reviewers=0, server_distillation=False), tmp_path / "on")
    for loop in (plain, off, on):
        loop.run()
    history = lambda loop: [r["clients"] for r in loop.history]  # noqa: E731
    assert history(off) == history(plain) and torch.equal(weight(off.server.student), weight(plain.server.student))
    assert history(on)[0] == history(plain)[0]
    assert history(on)[1] != history(plain)[1]


def test_it_holds_the_weights_nearer_to_what_was(tmp_path):
    ends = {}
    for strength in (0.0, 1.0, 10.0):
        loop = staged(
            CFeD(weight=strength, reviewers=0, server_distillation=False), tmp_path / str(strength), local_training=4
        )
        loop.set_up()
        loop.run_round(1)
        before = weight(loop.server.student).clone()
        loop.run_round(2)
        ends[strength] = float((weight(loop.server.student) - before).norm())
    assert ends[0.0] > ends[1.0] > 0


def test_settings_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="weight must be at least 0"):
        CFeD(weight=-1)
    with pytest.raises(UserError, match="temperature must be > 0"):
        CFeD(temperature=0)
    with pytest.raises(UserError, match=r"reviewers must be a share of the clients in \[0, 1\), got 1"):
        CFeD(reviewers=1)
    with pytest.raises(UserError, match="it needs server_distillation: false"):
        CFeD(robust=Median())
    CFeD(robust=Median(), server_distillation=False)
    with pytest.raises(UserError, match="cfed needs an arrival"):
        federation(CFeD(), tmp_path).run()


def test_a_round_s_clients_are_divided_into_learners_and_reviewers(tmp_path):
    # each takes one full-batch step from the same weights: a learner down the gradient of CE on its own sample, a
    # reviewer down that of λ T² KL(previous ‖ now) on the proxy set, λ T (now - previous) / n in its logits
    method = CFeD(weight=3.0, temperature=2.0, reviewers=0.5, server_distillation=False)
    loop = staged(method, tmp_path, rounds=10, local_training=1)
    loop.set_up()
    loop.run_round(1)
    previous = weight(loop.server.student).T.clone()
    reviewed = []
    for round in range(2, 11):
        start = weight(loop.server.student).clone()
        loop.run_round(round)
        answers = [row.client for row in loop.ledger.rows() if row.round == round and row.kind == "responses"]
        assert len(answers) == 1
        reviewed += answers
        ends = []
        for client, (row, label) in enumerate([(0, 0), (1, 1)]):
            gradient = torch.zeros(2, 2)  # of the logits of both proxy rows, which are the private samples, too
            if client in answers:
                gradient = 3 * 2 * (torch.softmax(start.T / 2, 1) - torch.softmax(previous / 2, 1)) / 2
            else:
                gradient[row] = torch.softmax(start.T[row], 0) - F.one_hot(torch.tensor(label), 2)
            ends.append(start - gradient.T)
        torch.testing.assert_close(weight(loop.server.student), 0.25 * ends[0] + 0.75 * ends[1])
    assert set(reviewed) == {0, 1}  # drawn anew in every round


@pytest.mark.parametrize(
    ("share", "cohort", "counts"), [(0.4, 5, {2}), (0.4, 10, {4}), (0.9, 2, {1}), (0.4, 2, {0, 1}), (0.4, 1, {0, 1})]
)
def test_the_share_of_reviewers_is_met(tmp_path, share, cohort, counts):
    server, method = staged(CFeD(), tmp_path).server, CFeD(reviewers=share)
    found, times = [], Counter()
    for round in range(1, 301):
        server.start_round(round)
        server.cohort = [3 * i for i in range(cohort)]
        chosen = method._reviewers(server)
        assert chosen <= set(server.cohort) and chosen == method._reviewers(server)
        found.append(len(chosen))
        times.update(chosen)
    assert set(found) == counts
    rate = sum(found) / len(found) / cohort  # everybody reviews as often as any other
    for client in server.cohort:
        assert abs(times[client] / 300 - rate) < 4 * (rate * (1 - rate) / 300) ** 0.5
    if len(counts) > 1:  # at least once in so many rounds by four standard deviations
        assert abs(sum(found) / len(found) - share * cohort) < 4 * 0.5 / 300**0.5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_server_distils_what_all_models_and_the_last_one_say(tmp_path, temperature):
    # the first round, from W = 0, in which clients' one step gives ±½: see test_one_round
    method = CFeD(temperature=temperature)
    loop = staged(method, tmp_path, local_training=1, rounds=1, server_distil=3)
    loop.run()
    models = [torch.tensor(w) for w in ([[0.5, 0], [-0.5, 0]], [[0, -0.5], [0, 0.5]], [[0.0, 0], [0, 0]])]
    target = torch.stack([torch.softmax(w.T / temperature, 1) for w in models]).mean(0)
    expected = 0.25 * models[0] + 0.75 * models[1]
    for _ in range(3):  # T² KL has gradient T (now - target) / n in the logits
        gradient = temperature * (torch.softmax(expected.T / temperature, 1) - target) / 2
        expected = expected - gradient.T
    torch.testing.assert_close(weight(loop.server.student), expected)


def test_a_model_that_the_server_cannot_ask_is_refused_whole(tmp_path):
    loop = staged(CFeD(), tmp_path, local_training=1, rounds=1)
    good, aggregate = {"linear.weight": torch.eye(2)}, loop.method.aggregate(loop.server)
    assert aggregate.result() is None
    for tensors, samples, said in (
        ({"linear.weight": torch.full((2, 2), torch.nan)}, 1, "not finite"),
        ({"linear.bias": torch.zeros(2)}, 1, "tensors missing"),
        (good, 0, "0 samples"),
    ):
        with pytest.raises(RejectedMessageError, match=said):
            aggregate.add(Parameters(tensors, samples), 0)
    aggregate.add(Parameters(good, 1), 1)
    mean, probabilities = aggregate.result()
    assert torch.equal(mean["linear.weight"], torch.eye(2))
    torch.testing.assert_close(probabilities, (torch.softmax(torch.eye(2) / 2, 1) + 0.5) / 2)


@pytest.mark.slow
def test_domains_that_are_gone_are_forgotten_less(tmp_path):
    """Half the angles and rounds of the recipe; forgetting is what the best accuracy on the first angle has lost.

    By rehearsal at the clients alone: so few rounds are too few for a division, which learns new data more slowly.
    """
    lost = {}
    methods = {"fedavg": "fedavg", "cfed": "{target: cfed, args: {reviewers: 0, server_distillation: false}}"}
    for name, method in methods.items():
        short = ["data.args.angles=[0, 90]", "arrival.args={domains: [0°, 90°], rounds: 8}", "federation.rounds=16"]
        quiet = ["callbacks=[]", "fabric.accelerator=cpu", "checkpoint.every=99", f"method={method}"]
        loop = build(load(ROOT / "recipes/continual/rotated_digits.yaml", [*short, *quiet]), tmp_path / name)
        lost[name] = loop.run()["metrics"]["student/continual/forgetting"]
    assert lost["cfed"] < lost["fedavg"] / 2
