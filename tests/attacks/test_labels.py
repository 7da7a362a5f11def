import numpy as np
import pytest
import torch
from scipy.stats import entropy

from fdl.attacks.base import AttackTarget
from fdl.attacks.labels import LabelLeakage, divergence, estimate_histograms, total_variation_distance
from fdl.errors import UserError
from fdl.messages import QuantizedLogWeights, Responses
from tests.attacks.runs import finished


def test_distances_are_those_of_the_textbook():
    truth, guess = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), np.array([[0.25, 0.25, 0.5], [0.2, 0.4, 0.4]])
    np.testing.assert_allclose(divergence(truth, guess), [entropy(t, g) for t, g in zip(truth, guess)])
    np.testing.assert_allclose(total_variation_distance(truth, guess), [0.5, 0.8])
    assert (divergence(truth, truth) < 1e-3).all() and np.isfinite(divergence(truth, truth[::-1])).all()


def test_estimates_follow_their_definitions():
    values = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]])
    found = estimate_histograms(
        Responses(values, "probabilities", None, QuantizedLogWeights.quantize(torch.tensor([0.0, 0, -200, -200])))
    )
    np.testing.assert_allclose(found["mean"], [0.375, 0.625])
    np.testing.assert_allclose(found["confident"], [1.25 / 3, 1.75 / 3])  # of rows 0 and 1, and of rows 2 and 3
    np.testing.assert_allclose(found["weighted"], [0.625, 0.375], atol=1e-6)
    assert "weighted" not in estimate_histograms(Responses(values, "probabilities"))


def test_answers_of_specialists_give_away_their_classes(tmp_path):
    loop = finished(tmp_path, partition={"target": "dirichlet", "args": {"alpha": 0.1}})
    metrics = LabelLeakage().run(AttackTarget(loop)).metrics
    for estimate in ("mean", "confident", "weighted"):
        assert metrics[f"{estimate}/total_variation"] < 0.8 * metrics["guess/total_variation"]
        assert metrics[f"{estimate}/kl"] < metrics["guess/kl"]
    guess = LabelLeakage().run(AttackTarget(loop)).arrays["guess"]
    pooled = sum(client.train.labels.bincount(minlength=10) for client in loop.clients).double()
    np.testing.assert_allclose(guess[0], (pooled / pooled.sum()).numpy())


def test_who_sends_no_answers_tells_nothing(tmp_path):
    loop = finished(tmp_path, method="fedavg", channel={}, federation={"clients": 2, "rounds": 1})
    with pytest.raises(UserError, match="no client sends answers"):
        LabelLeakage().run(AttackTarget(loop))
