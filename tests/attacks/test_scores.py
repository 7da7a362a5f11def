import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fdl.attacks.roc import Roc
from fdl.attacks.scores import MANY_SHADOWS, lira, loss_threshold, rmia
from fdl.attacks.signals import log_odds, probabilities, response_signals
from fdl.messages import Responses

SAMPLES = 3000


@pytest.fixture(scope="module")
def planted():
    """Every sample is hard in its own way, and one unit easier for a model that was trained on it."""
    draw = np.random.default_rng(0)
    hardness = draw.normal(0, 5, SAMPLES)
    inside = draw.permuted(np.arange(128)[:, None].repeat(SAMPLES, 1), axis=0) % 2 == 0
    shadows = draw.normal(hardness + inside, 1.0)
    member = np.arange(SAMPLES) % 2 == 0
    phi = draw.normal(hardness + member, 1.0)
    return phi, shadows, inside, member


def auc(scores, member):
    return Roc.of(scores[member], scores[~member]).auc


def test_log_odds_keeps_its_digits_where_probabilities_round_to_one():
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 49.0], [1.0, 2.0, 3.0]])
    labels = np.array([0, 0, 1])
    expected = [50 - math.log(2), -math.log(math.exp(50) + math.exp(49)), 2 - math.log(math.e + math.exp(3))]
    np.testing.assert_allclose(log_odds(logits, labels), expected, rtol=1e-12)
    p = torch.softmax(logits[2].double(), 0)[1]
    assert log_odds(logits, labels)[2] == pytest.approx(float(torch.log(p) - torch.log(1 - p)))


def test_shadows_tell_members_apart_where_the_loss_cannot(planted):
    phi, shadows, inside, member = planted
    groups = np.zeros(SAMPLES, int)
    best = norm.cdf(1 / math.sqrt(2))  # of the likelihood ratio, were it known exactly
    assert auc(loss_threshold(phi), member) == pytest.approx(norm.cdf(1 / math.sqrt(52)), abs=0.03)
    for online in (True, False):
        assert auc(lira(phi, shadows, inside, groups, online), member) == pytest.approx(best, abs=0.03)
        few = lira(phi, shadows[:16], inside[:16], groups, online)
        assert best - 0.06 < auc(few, member) < best + 0.01
    assert auc(rmia(phi, shadows, inside, groups, online=True), member) > auc(loss_threshold(phi), member) + 0.05


def test_lira_is_its_formula_sample_by_sample(planted):
    phi, shadows, inside, _ = planted
    assert len(shadows) >= MANY_SHADOWS
    groups = np.zeros(SAMPLES, int)
    online, offline = (lira(phi, shadows, inside, groups, how) for how in (True, False))
    for i in range(0, SAMPLES, 500):
        ins, outs = shadows[inside[:, i], i], shadows[~inside[:, i], i]
        ratio = norm.logpdf(phi[i], ins.mean(), ins.std(ddof=1)) - norm.logpdf(phi[i], outs.mean(), outs.std(ddof=1))
        assert online[i] == pytest.approx(ratio)
        assert 1 - math.exp(-offline[i]) == pytest.approx(norm.cdf(phi[i], outs.mean(), outs.std(ddof=1)))


def test_few_shadows_share_the_variance_of_their_group():
    shadows = np.array([[0.0, 0, 10], [2, 4, 10], [0, 0, 10], [0, 0, 10]])
    inside = np.array([[False] * 3, [False] * 3, [True] * 3, [True] * 3])
    scores = lira(np.array([1.0, 2.0, 11.0]), shadows, inside, np.array([0, 0, 1]), online=False)
    deviation = math.sqrt((2 + 8) / 2)  # sums of squares over degrees of freedom, of the first two
    np.testing.assert_allclose(scores[:2], -np.log(norm.sf(np.array([0.0, 0.0]), scale=deviation)))
    assert scores[2] > 100  # the third is alone with its vanishing variance


def test_offline_lira_goes_on_ordering_where_probabilities_round_to_one():
    shadows = np.tile([[0.0], [1.0], [0.5], [0.5]], (1, 2))
    inside = np.array([[False, False], [False, False], [True, True], [True, True]])
    near, far = lira(np.array([20.0, 30.0]), shadows, inside, np.zeros(2, int), online=False)
    assert far > near > 100


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_rmia_is_its_formula_pair_by_pair(online, gamma):
    draw = np.random.default_rng(1)
    phi, shadows, groups = draw.normal(size=12), draw.normal(size=(6, 12)), np.arange(12) % 2
    inside = draw.permuted(np.arange(6)[:, None].repeat(12, 1), axis=0) % 2 == 0
    p = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    out = np.array([p(shadows[~inside[:, i], i]).mean() for i in range(12)])
    ins = np.array([p(shadows[inside[:, i], i]).mean() for i in range(12)])
    prior = (ins + out) / 2 if online else (1.3 * out + 0.7) / 2
    ratio = p(phi) / prior
    expected = [
        np.mean([ratio[x] / ratio[z] >= gamma for z in range(12) if z != x and groups[z] == groups[x]])
        for x in range(12)
    ]
    np.testing.assert_allclose(rmia(phi, shadows, inside, groups, online, gamma), expected)


def test_permuted_samples_get_permuted_scores(planted):
    phi, shadows, inside, _ = planted
    groups = np.arange(SAMPLES) % 3
    order = np.random.default_rng(2).permutation(SAMPLES)
    for score in (
        lambda o: loss_threshold(phi[o]),
        lambda o: lira(phi[o], shadows[:8, o], inside[:8, o], groups[o], True),
        lambda o: lira(phi[o], shadows[:, o], inside[:, o], groups[o], False),
        lambda o: rmia(phi[o], shadows[:, o], inside[:, o], groups[o], False),
    ):
        np.testing.assert_allclose(score(order), score(np.arange(SAMPLES))[order], rtol=1e-9)


def test_missing_shadows_are_left_out(planted):
    phi, shadows, inside, _ = planted
    holes = shadows[:8].copy()
    holes[3] = np.nan
    kept = [0, 1, 2, 4, 5, 6, 7]
    groups = np.zeros(SAMPLES, int)
    for score in (lira, rmia):
        np.testing.assert_allclose(
            score(phi, holes, inside[:8], groups, False), score(phi, shadows[kept], inside[kept], groups, False)
        )


def test_answers_near_a_sample_stand_for_it():
    said = Responses(torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]), "probabilities", torch.tensor([0, 2, 3]))
    neighbours = np.array([[0, 2], [3, 1], [1, 1]])  # row 1 was not answered
    phi = response_signals(said, neighbours, np.array([0, 1, 0]), 4)
    np.testing.assert_allclose(phi[:2], [math.log(0.7 / 0.3), math.log(0.8 / 0.2)], rtol=1e-6)
    assert np.isnan(phi[2])
    logits = Responses(torch.tensor([[1.0, 2.0]]), "logits")
    np.testing.assert_allclose(probabilities(logits), torch.softmax(torch.tensor([[1.0, 2.0]]).double(), 1).numpy())
