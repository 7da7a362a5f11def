"""Federated mutual learning on the toy federation, where both models are a margin z: logits (z, -z), p = σ(2z)."""

import math

import pytest
import torch

from fdl.errors import UserError
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.knowledge.aggregation.server_optimizers import Adam
from fdl.methods.fedavg import FedAvg
from fdl.methods.fml import FML
from fdl.methods.single_site import SingleSite
from tests.test_loop import outcome
from tests.toy import federation, weight


def run(method, folder, **settings):
    loop = federation(method, folder, **settings)
    loop.run()
    return loop


def sigma(z):
    return 1 / (1 + math.exp(-z))


def margins(share_f, share_g, temperature, steps):
    """Gradient descent on both losses at rate 1, from their gradients: CE gives p - 1, T² KL gives T (p_T - q_T)."""
    f = g = 0.0
    for _ in range(steps):
        (p, q), (soft_p, soft_q) = ((sigma(2 * f / t), sigma(2 * g / t)) for t in (1, temperature))
        step_f = share_f * (p - 1) + (1 - share_f) * temperature * (soft_p - soft_q)
        step_g = share_g * (q - 1) + (1 - share_g) * temperature * (soft_q - soft_p)
        f, g = f - step_f, g - step_g
    return f, g


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature"), [(0.75, 0.25, 1.0), (0.75, 0.25, 3.0), (0.0, 1.0, 1.0), (0.3, 0.9, 2.0)]
)
def test_both_models_after_three_steps(tmp_path, alpha, beta, temperature):
    f, g = margins(alpha, beta, temperature, 3)
    loop = run(FML(alpha, beta, temperature), tmp_path, local_training=3)
    expected = torch.tensor([[0.25 * g, -0.75 * g], [-0.25 * g, 0.75 * g]])
    torch.testing.assert_close(weight(loop.server.student), expected)
    own = [client.state["specialist"]["linear.weight"] for client in loop.clients]
    torch.testing.assert_close(own[0], torch.tensor([[f, 0.0], [-f, 0.0]]))
    torch.testing.assert_close(own[1], torch.tensor([[0.0, -f], [0.0, f]]))


def test_the_parts_of_the_loss_are_logged(tmp_path):
    loop = run(FML(0.75, 0.25), tmp_path, local_training=2)
    seen = loop.history[0]["clients"]["0"]
    # first step: both at p = ½, so CE = log 2 and KL = 0; second: margins ⅜ and ⅛
    p, q = sigma(0.75), sigma(0.25)
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert seen["fit/personal_cross_entropy"] == pytest.approx((math.log(2) - math.log(p)) / 2, rel=1e-5)
    assert seen["fit/personal_distillation"] == pytest.approx(kl / 2, rel=1e-4)
    assert seen["fit/loss"] == pytest.approx(seen["fit/personal_loss"] + seen["fit/meme_loss"], rel=1e-5)


def test_from_labels_alone_it_is_fedavg_beside_local_training(tmp_path):
    settings = {"rounds": 3, "local_training": 3}
    mutual = run(FML(1.0, 1.0, optimizer=Adam()), tmp_path / "a", **settings)
    average = run(FedAvg(Adam()), tmp_path / "b", **settings)
    alone = run(SingleSite(), tmp_path / "c", **settings)
    assert torch.equal(weight(mutual.server.student), weight(average.server.student))
    for one, other in zip(mutual.clients, alone.clients):
        assert torch.equal(one.state["specialist"]["linear.weight"], other.state["specialist"]["linear.weight"])


def test_only_the_meme_travels(tmp_path):
    mutual, average = run(FML(), tmp_path / "a", rounds=2), run(FedAvg(), tmp_path / "b", rounds=2)
    assert mutual.ledger.by_kind() == average.ledger.by_kind()
    assert estimate_bytes(mutual) == estimate_bytes(average)


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    settings = {"rounds": 4, "local_training": 3, "client_fraction": 0.5}
    straight = run(FML(optimizer=Adam()), tmp_path / "straight", **settings)
    crashed = federation(FML(optimizer=Adam()), tmp_path / "crashed", **settings)
    crashed.rounds = 2
    crashed.run()
    resumed = federation(FML(optimizer=Adam()), tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert resumed.resumed_from == 2
    assert outcome(resumed) == outcome(straight)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"alpha": 1.5}, "alpha must be"), ({"beta": -0.1}, "beta must be"), ({"temperature": 0.0}, "temperature")],
)
def test_settings_that_make_no_sense(settings, reason):
    with pytest.raises(UserError, match=reason):
        FML(**settings)
