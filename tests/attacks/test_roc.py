import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from fdl.attacks.roc import (
    Roc,
    advantage_ceiling,
    balanced_accuracy,
    ceiling,
    epsilon_lower,
    lower_bound,
    measure,
    upper_bound,
)


def stream(seed=0):
    return np.random.default_rng(seed)


def gaussians(gap, n=20_000, seed=0):
    draw = stream(seed)
    return draw.normal(gap, 1, n), draw.normal(0, 1, n)


def gdp_delta(mu, epsilon):
    """δ of the Gaussian mechanism with sensitivity over deviation mu (Dong et al., 2022, corollary 2.13)."""
    return norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)


def test_planted_gap_has_the_closed_form_auc_and_rates():
    members, others = gaussians(1.0)
    roc = Roc.of(members, others)
    assert roc.auc == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.005)  # .7602
    for fpr in (0.001, 0.01, 0.1):
        truth = norm.sf(norm.isf(fpr) - 1)
        assert roc.tpr_at(fpr) == pytest.approx(truth, abs=5 * math.sqrt(truth / len(others) / fpr**0.5) + 0.003)


def test_auc_says_who_scores_higher():
    members, others = gaussians(1.0, 2000)
    assert Roc.of(members, others).auc > 0.7
    assert Roc.of(members, others).auc == pytest.approx(1 - Roc.of(others, members).auc)
    assert Roc.of(np.zeros(5), np.zeros(7)).auc == 0.5
    assert Roc.of(np.array([np.inf, 1.0]), np.array([-np.inf, 0.0])).auc == 1.0


def test_rates_at_a_threshold_count_ties_as_claims():
    roc = Roc.of(np.array([3.0, 2, 2, 0]), np.array([2.0, 1, 1, 1, 0]))
    assert roc.tpr_at(0.0) == 0.25  # above 2 only: at 2 there is one false positive
    assert roc.tpr_at(0.19) == 0.25
    assert roc.tpr_at(0.2) == 0.75


def test_noise_is_worth_nothing():
    values = [measure(stream(s).normal(size=400), stream(s + 99).normal(size=400), stream(s)) for s in range(30)]
    assert np.mean([v["auc"] for v in values]) == pytest.approx(0.5, abs=0.015)
    # a threshold that is chosen where it is measured would show about .53
    assert np.mean([v["balanced_accuracy"] for v in values]) == pytest.approx(0.5, abs=0.01)


def test_balanced_accuracy_of_a_gap():
    assert balanced_accuracy(*gaussians(1.0), stream()) == pytest.approx(norm.cdf(0.5), abs=0.005)
    assert balanced_accuracy(np.full(10, 1.0), np.zeros(10), stream()) == 1.0
    assert balanced_accuracy(np.zeros(10), np.zeros(10), stream()) == 0.5


@pytest.mark.parametrize(
    ("non_members", "resolved", "rates"),
    [(10_000, 0.001, {"tpr_at_0.1pct_fpr", "tpr_at_1pct_fpr"}), (9_999, None, {"tpr_at_1pct_fpr"}), (999, None, set())],
)
def test_rates_that_cannot_be_told_are_left_out(non_members, resolved, rates):
    metrics = measure(stream().normal(size=50), stream().normal(size=non_members), stream())
    assert {name for name in metrics if name.endswith("pct_fpr")} == rates
    assert metrics["resolved_fpr"] == (resolved or 10 / non_members)
    assert metrics["tpr_at_resolved_fpr"] >= 0


def test_clopper_pearson_is_scipys():
    for count, n in ((0, 20), (3, 20), (20, 20), (517, 1000)):
        truth = binomtest(count, n).proportion_ci(confidence_level=0.98, method="exact")
        assert float(lower_bound(np.array(count), n, 0.01)) == pytest.approx(truth.low)
        assert float(upper_bound(np.array(count), n, 0.01)) == pytest.approx(truth.high)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.5])
def test_the_ceiling_touches_the_best_attack_on_a_gaussian_mechanism_and_never_lies_below(mu):
    fpr = np.geomspace(1e-6, 1, 20_000)
    best = norm.sf(norm.isf(fpr) - mu)  # by Neyman and Pearson no attack has more
    for epsilon in (0.1, 1.0, 2.0):
        room = ceiling(fpr, epsilon, gdp_delta(mu, epsilon)) - best
        assert room.min() == pytest.approx(0, abs=1e-4)
        assert room.min() > -1e-9


def test_the_largest_advantage_is_where_the_bounds_meet():
    fpr = np.linspace(0, 1, 100_001)
    for epsilon, delta in ((0.0, 0.0), (0.5, 1e-3), (2.0, 0.05), (8.0, 0.0)):
        expected = (math.exp(epsilon) - 1 + 2 * delta) / (math.exp(epsilon) + 1)
        assert advantage_ceiling(epsilon, delta) == pytest.approx(expected)
        assert (ceiling(fpr, epsilon, delta) - fpr).max() == pytest.approx(expected, abs=1e-4)
    assert advantage_ceiling(math.inf, 0.0) == 1
    assert (ceiling(fpr, math.inf, 0.0) == 1).all()


def test_shown_epsilon_stays_below_the_truth_and_comes_near_it():
    mu, epsilon = 1.0, 2.0
    delta = gdp_delta(mu, epsilon)
    shown = [epsilon_lower(*gaussians(mu, 1000, seed), delta, 0.95, stream(seed)) for seed in range(40)]
    assert sum(value > epsilon for value in shown) <= 4
    assert epsilon_lower(*gaussians(mu, 200_000), delta, 0.95, stream()) > 0.75 * epsilon
    noise = [epsilon_lower(*gaussians(0.0, 300, seed), 0.0, 0.95, stream(seed)) for seed in range(40)]
    assert sum(value > 0 for value in noise) <= 4


def test_an_attack_that_is_surest_of_non_members_shows_as_much():
    """All four inequalities count: here only those of the opposite claim show anything."""
    members, others = gaussians(3.0, 3000)
    plain = epsilon_lower(members, others, 0.0, 0.95, stream())
    mirrored = epsilon_lower(-members, -others, 0.0, 0.95, stream())
    assert plain > 2 and mirrored > 2


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="not a number"):
        Roc.of(np.array([np.nan, 1.0]), np.zeros(3))
