"""Literal numbers after one round of the toy federation, each worked out by hand.

With weights W = 0 both classes have probability ½, so one full-batch step of client 0 gives W₀ = [[½, 0], [-½, 0]] and
of client 1 W₁ = [[0, -½], [0, ½]]. σ(1) = 0.731059 is a specialist's probability for its own class after that step.
"""

import math
from dataclasses import replace

import pytest
import torch

from fdl.knowledge.aggregation.server_optimizers import SGD, Adagrad, Adam, Yogi
from fdl.knowledge.confidence.base import SampleCount
from fdl.messages import QuantizedLogWeights
from fdl.methods.centralized import Centralized
from fdl.methods.distillation import Distillation
from fdl.methods.fedavg import FedAvg
from fdl.methods.feddf import FedDF
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.methods.fedprox import FedProx
from fdl.methods.single_site import SingleSite
from tests.toy import federation, weight

SIGMA = 1 / (1 + math.exp(-1))
MEAN = torch.tensor([[0.125, -0.375], [-0.125, 0.375]])  # ¼ W₀ + ¾ W₁


def run(method, folder, **settings):
    loop = federation(method, folder, **settings)
    loop.run()
    return loop


def student(loop):
    return weight(loop.server.student)


def test_fedavg_is_the_mean_by_sample_counts(tmp_path):
    torch.testing.assert_close(student(run(FedAvg(), tmp_path)), MEAN)


def test_one_full_batch_step_of_fedavg_is_one_centralised_step(tmp_path):
    federated, central = run(FedAvg(), tmp_path / "a"), run(Centralized(), tmp_path / "b")
    torch.testing.assert_close(student(federated), student(central))
    assert central.ledger.totals() == {"upload_bytes": 0, "download_bytes": 0, "setup_bytes": 0}


def test_single_site_keeps_every_specialist_apart(tmp_path):
    loop = run(SingleSite(), tmp_path)
    torch.testing.assert_close(
        loop.clients[0].state["specialist"]["linear.weight"], torch.tensor([[0.5, 0.0], [-0.5, 0.0]])
    )
    torch.testing.assert_close(
        loop.clients[1].state["specialist"]["linear.weight"], torch.tensor([[0.0, -0.5], [0.0, 0.5]])
    )
    # on the test set {(1, 0) of class 0, (0, 1) of class 1} each is right on its own sample; a tie goes to class 0
    clients = loop.history[-1]["clients"]
    assert (clients["0"]["test/accuracy"], clients["1"]["test/accuracy"]) == (0.5, 1.0)
    assert loop.history[-1]["metrics"]["specialists/test/accuracy"] == 0.75
    assert loop.ledger.totals()["upload_bytes"] == 0


def test_fedprox_pulls_the_second_step_back_by_mu_times_the_first(tmp_path):
    # second step of client 0: ½ + (1 - σ(1)) - μ ½; of client 1 the same in its own column
    mu = 0.2
    second = 0.5 + (1 - SIGMA) - mu * 0.5
    expected = torch.tensor([[0.25 * second, -0.75 * second], [-0.25 * second, 0.75 * second]])
    loop = run(FedProx(mu=mu), tmp_path, local_training=2)
    torch.testing.assert_close(student(loop), expected)
    # the mean proximal term of client 0's two steps: 0 and μ/2 (½² + ½²)
    assert loop.history[0]["clients"]["0"]["fit/proximal"] == pytest.approx(mu / 2 * 0.5 / 2, rel=1e-5)


def test_fedprox_without_mu_is_fedavg(tmp_path):
    prox, avg = (
        run(FedProx(mu=0.0), tmp_path / "a", local_training=3, rounds=3),
        run(FedAvg(), tmp_path / "b", local_training=3, rounds=3),
    )
    assert torch.equal(student(prox), student(avg))
    assert prox.ledger.totals() == avg.ledger.totals()


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        # first round, D = mean: momentum starts empty
        (SGD(lr=0.5, momentum=0.9), lambda d: 0.5 * d),
        (SGD(lr=0.5, momentum=0.9, nesterov=True), lambda d: 0.5 * 1.9 * d),
        (Adam(lr=0.1, tau=1e-3), lambda d: 0.1 * 0.1 * d / (math.sqrt(0.99e-6 + 0.01 * d * d) + 1e-3)),
        (Yogi(lr=0.1, tau=1e-3), lambda d: 0.1 * 0.1 * d / (math.sqrt(1e-6 + 0.01 * d * d) + 1e-3)),
        (Adagrad(lr=0.1, tau=1e-3), lambda d: 0.1 * d / (math.sqrt(1e-6 + d * d) + 1e-3)),
    ],
)
def test_server_optimisers_on_the_first_pseudo_gradient(tmp_path, optimizer, factor):
    expected = MEAN.clone().apply_(factor)
    torch.testing.assert_close(student(run(FedAvg(optimizer), tmp_path)), expected)


def test_server_sgd_without_momentum_at_rate_one_is_plain_averaging(tmp_path):
    plain = run(FedAvg(), tmp_path / "a", rounds=3)
    sgd = run(FedAvg(SGD()), tmp_path / "b", rounds=3)
    torch.testing.assert_close(student(plain), student(sgd))


def test_server_momentum_has_to_be_asked_for():
    # D = 1 three times: η, 2η, 3η without; with β the last step is η (1 + β + β²)
    moments, total = {}, 0.0
    for _ in range(3):
        total += float(SGD(lr=0.5).displacement(torch.ones(1), moments))
    assert total == 1.5
    moments = {}
    steps = [float(SGD(lr=0.5, momentum=0.9).displacement(torch.ones(1), moments)) for _ in range(3)]
    assert steps == pytest.approx([0.5, 0.95, 1.355])


def test_first_step_of_adam_with_a_unit_displacement():
    # D = 1: 0.1 η / (√(0.99 τ² + 0.01) + τ) = 0.99005 η for τ = 1e-3
    moved = Adam(lr=1.0, tau=1e-3).displacement(torch.ones(1), {})
    assert moved.item() == pytest.approx(0.99005, abs=1e-5)


def test_feddf_distils_the_mean_logits_into_the_average(tmp_path):
    # mean logits ½ (W₀ + W₁) x: (¼, -¼) and (-¼, ¼), so the teacher says p = σ(½) for the right class.
    # The average answers x₀ with logits (⅛, -⅛), q₀ = σ(¼), and x₁ with (-⅜, ⅜), q₁ = σ(¾); one step adds (p - q) / 2.
    def sigma(z):
        return 1 / (1 + math.exp(-z))

    first, second = 0.125 + (sigma(0.5) - sigma(0.25)) / 2, 0.375 + (sigma(0.5) - sigma(0.75)) / 2
    expected = torch.tensor([[first, -second], [-first, second]])
    torch.testing.assert_close(student(run(FedDF(select="last"), tmp_path)), expected)


def test_feddf_without_distillation_is_fedavg(tmp_path):
    fused, plain = (
        run(FedDF(select="last"), tmp_path / "a", server_distil=0, rounds=3),
        run(FedAvg(), tmp_path / "b", rounds=3),
    )
    assert torch.equal(student(fused), student(plain))


def test_feddf_over_architectures_teaches_a_student_that_no_client_trains(tmp_path):
    loop = run(FedDF(architectures="specialists", select="last"), tmp_path)
    # the student starts at zero and takes one step of (p - ½) / 2 towards p = σ(½)
    step = (1 / (1 + math.exp(-0.5)) - 0.5) / 2
    torch.testing.assert_close(student(loop), torch.tensor([[step, -step], [-step, step]]))


def test_federated_distillation_from_the_mean_of_probabilities(tmp_path):
    # mean probability of the right class on either proxy row: ½ (σ(1) + ½); the student moves by half its excess over ½
    step = ((SIGMA + 0.5) / 2 - 0.5) / 2
    loop = run(FederatedDistillation(), tmp_path)
    torch.testing.assert_close(student(loop), torch.tensor([[step, -step], [-step, step]]))
    sent = loop.ledger.by_kind()
    assert sent["up/responses"] > 2 * 4 * 4 and "down/responses" not in sent


def test_federated_distillation_from_the_mean_of_logits(tmp_path):
    step = (1 / (1 + math.exp(-0.5)) - 0.5) / 2
    loop = run(FederatedDistillation(space="logits"), tmp_path)
    torch.testing.assert_close(student(loop), torch.tensor([[step, -step], [-step, step]]))


def test_feedback_reaches_the_specialists_in_the_second_round(tmp_path):
    # round 2, client 0: digest one step from W₀ towards the aggregate a = ½ (σ(1) + ½) on both rows, then one private
    # step. Its answer on x₁ was ½, so the second column becomes ± (a - ½) / 2.
    loop = run(FederatedDistillation(), tmp_path, rounds=2)
    column = loop.clients[0].state["specialist"]["linear.weight"][:, 1]
    step = ((SIGMA + 0.5) / 2 - 0.5) / 2
    torch.testing.assert_close(column, torch.tensor([-step, step]))
    without = run(FederatedDistillation(feedback="none"), tmp_path / "b", rounds=2)
    assert torch.equal(without.clients[0].state["specialist"]["linear.weight"][:, 1], torch.zeros(2))
    assert without.ledger.totals()["download_bytes"] == 0 < loop.ledger.totals()["download_bytes"]


def test_distillation_trains_the_teacher_on_all_and_the_student_on_its_answers(tmp_path):
    # teacher after one pooled step: MEAN. At T = 2 the student at zero moves by T (q_T - ½) / 2, q_T = σ(2 w / T)
    loop = run(Distillation(temperature=2.0), tmp_path)
    torch.testing.assert_close(weight(loop.server.teacher), MEAN)
    first, second = ((1 / (1 + math.exp(-2 * w / 2)) - 0.5) * 2 / 2 for w in (0.125, 0.375))
    torch.testing.assert_close(student(loop), torch.tensor([[first, -second], [-first, second]]))


def test_distillation_on_private_data_without_weight_is_centralised_training(tmp_path):
    labelled = run(Distillation(transfer="private", weight=0.0), tmp_path / "a", rounds=2)
    central = run(Centralized(), tmp_path / "b", rounds=2)
    torch.testing.assert_close(student(labelled), student(central))


@pytest.mark.parametrize("asked", [True, False])
def test_a_confidence_is_sent_by_all_or_by_none(tmp_path, asked):
    loop = federation(FederatedDistillation(SampleCount() if asked else None), tmp_path)
    update = loop.method.local_update

    def cheat(client, download):
        message = yield from update(client, download)
        if client.id == 1:
            confidence = None if asked else QuantizedLogWeights.quantize(torch.full((2,), 30.0))
            message = replace(message, confidence=confidence)
        return message

    loop.method.local_update = cheat
    loop.run()
    assert list(loop.history[0]["refused"]) == ["1"]
