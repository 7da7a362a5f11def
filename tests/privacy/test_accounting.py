"""The account of what was spent, against published figures and closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("dp_accounting")

from fdl.errors import UserError
from fdl.privacy.accounting import epsilon, event, events_of, solve_noise, spend

DELTA = 1e-5


@pytest.mark.parametrize(
    ("probability", "noise", "steps", "rdp", "pld"),
    [(0.01, 1.0, 1000, 2.1014, 1.8282), (0.00512, 1.1, 9750, 2.6096, 2.3912), (1.0, 10.0, 100, 4.7285, 4.3772)],
)
def test_known_figures(probability, noise, steps, rdp, pld):
    events = [event("dp_sgd", noise, probability, steps)]
    assert epsilon(events, DELTA, "rdp") == pytest.approx(rdp, abs=1e-4)
    assert epsilon(events, DELTA, "pld") == pytest.approx(pld, abs=1e-4)


def test_gaussian_mechanism_in_closed_form():
    # Balle and Wang (2018): δ(ε) = Φ(1/2z - εz) - e^ε Φ(-1/2z - εz)
    phi = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
    noise = 4.0
    spent = epsilon([event("gaussian", noise)], DELTA)
    exact = phi(1 / (2 * noise) - spent * noise) - math.exp(spent) * phi(-1 / (2 * noise) - spent * noise)
    assert exact == pytest.approx(DELTA, rel=2e-3)
    assert exact <= DELTA


def test_gaussians_compose_to_one_gaussian():
    # 1/z² add up: 3, 4 and twice 6
    parts = [event("gaussian", 3.0), event("gnmax", 4.0), event("gaussian", 6.0, count=2)]
    whole = event("gaussian", (1 / 9 + 1 / 16 + 2 / 36) ** -0.5)
    for accountant, tolerance in (("pld", 1e-3), ("rdp", 1e-9)):
        assert epsilon(parts, DELTA, accountant) == pytest.approx(epsilon([whole], DELTA, accountant), rel=tolerance)


def test_equal_events_are_counted_together():
    client = SimpleNamespace(state={})
    one = event("dp_sgd", 1.0, 0.1, 5)
    for what in (one, one, event("dp_sgd", 2.0, 0.1, 5), one):
        spend(client, what)
    assert [(e["noise_multiplier"], e["count"]) for e in events_of(client)] == [(1.0, 10), (2.0, 5), (1.0, 5)]
    assert one["count"] == 5
    apart = [event("dp_sgd", 1.0, 0.1, 15), event("dp_sgd", 2.0, 0.1, 5)]
    assert epsilon(events_of(client), DELTA, "rdp") == epsilon(apart, DELTA, "rdp")


def test_nothing_without_noise_is_private():
    assert epsilon([], DELTA) == math.inf
    assert epsilon([event("dp_sgd", 1.0, 0.1), event("counts", 0.0)], DELTA) == math.inf


def test_noise_that_hides_an_example_hides_no_institution():
    example, institution = event("dp_sgd", 2.0), event("gaussian", 2.0, level="institution")
    assert epsilon([example], DELTA, level="institution") == math.inf
    assert epsilon([institution], DELTA, level="institution") == epsilon([example], DELTA)
    assert epsilon([example, institution], DELTA) > epsilon([institution], DELTA, level="example")


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("target", "probability", "steps"), [(2.0, 0.05, 100), (0.3, 0.3, 40), (8.0, 0.01, 3000), (1.0, 1.0, 10)]
)
def test_noise_is_solved_for_and_stays_within_the_budget(accountant, target, probability, steps):
    noise = solve_noise(target, DELTA, probability, steps, accountant)
    spent = epsilon([event("dp_sgd", noise, probability, steps)], DELTA, accountant)
    assert 0.95 * target <= spent <= target


def test_numbers_out_of_range():
    for wrong in (lambda: event("x", -1.0), lambda: event("x", 1.0, 0.0), lambda: event("x", 1.0, level="person")):
        with pytest.raises(ValueError, match=r"noise_multiplier|level"):
            wrong()
    with pytest.raises(UserError, match="delta"):
        epsilon([event("x", 1.0)], 0.0)
    with pytest.raises(UserError, match="epsilon"):
        solve_noise(0.0, DELTA, 0.1, 10)
    with pytest.raises(UserError, match="next to no noise"):
        solve_noise(1e6, DELTA, 0.1, 1)
