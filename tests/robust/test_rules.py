import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.errors import UserError
from fdl.robust.coordinate_wise import Median, TrimmedMean
from fdl.robust.distance_based import Cronus, GeometricMedian, Krum, MultiKrum, NormClipping
from fdl.robust.history import ExpGuard
from fdl.robust.trust import FLTrust
from fdl.robust.votes import cap_shares
from tests.robust.votes import NoServer, ballot, decide

RULES = [
    Median(),
    TrimmedMean(0.2),
    GeometricMedian(),
    Krum(num_attackers=1),
    MultiKrum(num_attackers=1),
    Cronus(0.2),
    NormClipping(),
    NormClipping(0.5),
    FLTrust(judge="peers"),
    ExpGuard(),
]
ids = lambda rule: type(rule).__name__  # noqa: E731


def vectors(seed, n=7, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(Median(), 2), (TrimmedMean(0.2), 2), (TrimmedMean(0.0), 201.2), (Krum(num_attackers=1), 2)],
    ids=ids,
)
def test_five_numbers_of_which_one_lies(rule, expected):
    # Krum counts 5 - 1 - 2 = 2 neighbours: 1 and 2 both have 1 + 1; of equal scores the smaller id wins
    x = [0.0, 2.0, 1.0, 3.0, 1000.0]
    assert decide(rule, x).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "rule",
    [Krum(num_attackers=1), MultiKrum(num_attackers=1), Median(), GeometricMedian(), ExpGuard(), Cronus(0.2)],
    ids=ids,
)
@pytest.mark.parametrize("far", [100.0, 1e30])
def test_four_at_zero_and_one_far_away(rule, far):
    x = [[0.0, 0.0]] * 4 + [[far, far]]
    decision = rule.decide(ballot(x))
    assert decision.values.abs().max() < 1e-6
    assert decision.weights[4].item() < 1e-6


def test_the_size_of_a_lie_does_not_blur_the_honest():
    honest = vectors(0, n=6)
    for rule in (GeometricMedian(), Krum(num_attackers=1), MultiKrum(num_attackers=1, keep=3), Cronus(0.2)):
        near, far = (decide(rule, torch.cat([honest, torch.full((1, 5), size)])) for size in (1e7, 1e35))
        torch.testing.assert_close(near, far, rtol=0, atol=1e-4)
        assert near.norm() < honest.norm(dim=1).max()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(RULES), st.permutations(range(7)))
def test_who_comes_first_does_not_matter(seed, rule, order):
    x = vectors(seed)
    torch.testing.assert_close(decide(rule, x), decide(rule, x[list(order)]), rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(RULES), st.permutations(range(5)))
def test_permuted_coordinates_come_out_permuted(seed, rule, order):
    x = vectors(seed)
    torch.testing.assert_close(decide(rule, x)[list(order)], decide(rule, x[:, list(order)]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if not isinstance(rule, NormClipping) or rule.limit is None], ids=ids
)
def test_what_all_say_is_what_comes_out(rule):
    common = vectors(1, n=1)
    torch.testing.assert_close(decide(rule, common.expand(6, -1)), common[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_blocks_of_columns_change_nothing(rule):
    x = vectors(2, d=11)
    whole, parts = (rule.decide(ballot(x, block=block)) for block in (None, 3))
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.weights, parts.weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_who_does_not_answer_a_row_has_no_part_in_it(rule):
    x = torch.stack([vectors(seed) for seed in (3, 4)], dim=1)  # [7, 2, 5]
    partial = x.clone()
    partial[[1, 4], 1] = math.nan
    if isinstance(rule, FLTrust | ExpGuard):  # these judge over all rows, so only weights can be told
        assert (rule.decide(ballot(partial)).weights[[1, 4], 1] == 0).all()
        return
    found = rule.decide(ballot(partial))
    torch.testing.assert_close(found.values[0], decide(rule, x[:, 0]), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.values[1], decide(rule, x[[0, 2, 3, 5, 6], 1]), rtol=1e-7, atol=1e-9)
    assert (found.weights[[1, 4], 1] == 0).all()


def test_krum_decides_nothing_about_rows_of_too_few():
    x = torch.zeros(5, 2, 3)
    x[4, 1] = math.nan
    assert Krum(num_attackers=1).decide(ballot(x)).decided.tolist() == [True, False]


def test_a_weighted_median_is_that_of_repeated_values():
    x, times = vectors(5, n=4), [3, 1, 2, 1]
    repeated = x.repeat_interleave(torch.tensor(times), dim=0)
    torch.testing.assert_close(decide(Median(), x, shares=times), torch.quantile(repeated, 0.5, dim=0))
    trimmed = repeated.sort(dim=0).values[2:-2].mean(0)
    torch.testing.assert_close(decide(TrimmedMean(2 / 7), x, shares=times), trimmed)


def test_a_weighted_geometric_median_is_that_of_repeated_values():
    x, times = vectors(6, n=4), [3, 1, 2, 1]
    found = decide(GeometricMedian(), x, shares=times)
    repeated = decide(GeometricMedian(), x.repeat_interleave(torch.tensor(times), dim=0))
    torch.testing.assert_close(found, repeated, rtol=1e-5, atol=1e-6)


def test_nothing_is_nearer_to_all_than_the_geometric_median():
    x = vectors(7)
    found = decide(GeometricMedian(), x)
    pull = torch.nn.functional.normalize(x - found, dim=1).sum(0)  # the gradient of the sum of distances
    assert pull.norm() < 1e-6


def test_fltrust_by_formula():
    g, g0 = vectors(8), vectors(9, n=1)
    cosine = torch.nn.functional.cosine_similarity(g, g0).relu()
    expected = (cosine[:, None] * g * (g0.norm() / g.norm(dim=1))[:, None]).sum(0) / cosine.sum()
    torch.testing.assert_close(decide(FLTrust(least=0.0), g, reference=g0), expected)


def test_fltrust_does_not_listen_to_the_opposite():
    g0 = vectors(10, n=1)
    decision = FLTrust().decide(ballot(torch.cat([g0, -5 * g0, 3 * g0]), reference=g0))
    torch.testing.assert_close(decision.values, g0)
    torch.testing.assert_close(decision.weights[:, 0], torch.tensor([0.5, 0, 0.5]).double())
    assert not FLTrust().decide(ballot(-g0, reference=g0)).decided.any()


def test_fltrust_judges_a_client_by_the_rows_that_it_claims():
    # two rows; client 2 is right in row 0 and wrong in row 1, and says so by its share
    right = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    x = torch.stack([right, right, right * torch.tensor([[1.0], [-1.0]])])
    expert = FLTrust().decide(ballot(x, shares=[[0.2, 0.5], [0.2, 0.5], [0.6, 1e-3]], reference=right, bounded=True))
    boaster = FLTrust().decide(ballot(x, shares=[[0.2, 0.2], [0.2, 0.2], [0.2, 0.6]], reference=right, bounded=True))
    assert expert.weights[2, 0] > 0.59 and boaster.weights[2].abs().max() == 0


def test_clipping_by_formula():
    x = vectors(11)
    limit = x.norm(dim=1).median()
    factor = (limit / x.norm(dim=1)).clamp_max(1)
    torch.testing.assert_close(decide(NormClipping(), x), (factor[:, None] * x).mean(0))


def test_cronus_drops_those_far_along_the_direction_of_most_variance():
    x = torch.zeros(10, 3, dtype=torch.float64)
    x[:, 0] = torch.linspace(-0.1, 0.1, 10)
    x[[3, 8], 1] = torch.tensor([5.0, 6.0], dtype=torch.float64)  # ε = 0.2 of 10: one in each pass
    weights = Cronus(0.2).decide(ballot(x)).weights[:, 0]
    assert weights[[3, 8]].abs().max() == 0 and (weights > 0).sum() == 8


def test_cronus_by_the_eigenvectors_of_the_covariance():
    x = vectors(12, n=10, d=4)
    kept = np.arange(10)
    for _ in range(2):
        own = x[kept].numpy()
        top = np.linalg.eigh(np.cov(own.T))[1][:, -1]
        kept = np.delete(kept, np.abs((own - own.mean(0)) @ top).argmax())
    torch.testing.assert_close(decide(Cronus(0.2), x), x[kept].mean(0))


def test_weights_of_the_past_are_remembered_and_fade():
    server = NoServer()
    rule = ExpGuard(eta=1.0, tolerance=1.0, fade=0.5, limit=20.0)
    x = torch.tensor([[-1.0], [1.0], [0.0], [-1.0], [1.0], [3.0]])  # distances from 0: 1, 1, 0, 1, 1, 3; median 1
    rule.rule = _Origin()
    for expected in (-2.0, -3.0):
        rule.decide(ballot(x, server=server))
        assert server.state["robust"]["test"]["5"] == pytest.approx(expected)
    honest = rule.decide(ballot(x.clamp_max(1.0), server=server))
    assert server.state["robust"]["test"]["5"] == pytest.approx(-1.5)
    ratio = honest.weights[5, 0] / honest.weights[0, 0]
    assert ratio == pytest.approx(math.exp(-1.5))


class _Origin(GeometricMedian):
    def combine(self, one):
        return torch.zeros(1, 1, dtype=torch.float64), one.shares


def test_who_is_far_off_is_silenced_at_once():
    decision = ExpGuard().decide(ballot([0.1, 0.2, 0.3, 0.2, 1e30]))
    assert decision.weights[4] == 0 and 0.1 <= decision.values.item() <= 0.3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(1.0, 4.0))
def test_capped_shares_sum_to_one_and_none_is_above_the_cap(seed, n, cap):
    g = torch.Generator().manual_seed(seed)
    logs = (torch.rand(n, 6, generator=g, dtype=torch.float64) * 2 - 1) * 32
    logs[torch.rand(n, 6, generator=g) < 0.3] = -math.inf
    shares, count = cap_shares(logs, cap), torch.isfinite(logs).sum(0)
    torch.testing.assert_close(shares.sum(0), (count > 0).double())
    assert (shares <= (cap / count.clamp_min(1).double()).clamp_max(1) + 1e-9).all()
    # who is not cut keeps its proportion to others who are not
    free = shares < cap / count.clamp_min(1) * (1 - 1e-6)
    for row in range(6):
        own = (shares[free[:, row], row].log() - logs[free[:, row], row])[torch.isfinite(logs[free[:, row], row])]
        assert own.numel() < 2 or own.max() - own.min() < 1e-6


def test_a_cap_of_one_ignores_confidence_and_none_keeps_it():
    logs = torch.tensor([[30.0], [0.0], [-30.0], [-math.inf]], dtype=torch.float64)
    torch.testing.assert_close(cap_shares(logs, 1.0)[:3], torch.full((3, 1), 1 / 3).double())
    torch.testing.assert_close(cap_shares(logs, None), torch.softmax(logs, 0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Median(max_client_share=0.5), "max_client_share must be at least 1"),
        (lambda: TrimmedMean(0.5), "beta must be in"),
        (lambda: Cronus(0.0), "epsilon must be in"),
        (lambda: Krum(num_attackers=-1), "num_attackers must be at least 0"),
        (lambda: NormClipping(0.0), "limit must be a number > 0"),
        (lambda: FLTrust(judge="nobody"), "judge must be one of server, peers"),
        (lambda: ExpGuard(fade=0.0), "fade must be in"),
    ],
)
def test_wrong_settings_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()
