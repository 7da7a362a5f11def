import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.errors import UserError
from fdl.knowledge.aggregation.shares import Cap


def limited(logs, cap):
    return Cap(cap, "row").limit(logs)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([1.0, 1.3, 2.0, 4.0]))
def test_nobody_is_above_the_bound_and_the_others_keep_what_they_have(seed, clients, cap):
    g = torch.Generator().manual_seed(seed)
    logs = (torch.rand(clients, 30, generator=g, dtype=torch.float64) * 2 - 1) * 32
    logs[torch.rand(clients, 30, generator=g) < 0.3] = -torch.inf
    cut = limited(logs, cap)
    shares = torch.softmax(cut, 0).nan_to_num(0.0)
    bound = (cap / torch.isfinite(logs).sum(0).clamp_min(1).double()).clamp_max(1.0)
    assert (shares <= bound * (1 + 1e-6)).all()
    moved = cut < logs
    assert torch.equal(cut[~moved], logs[~moved])
    # whoever was cut has exactly the bound: no more was taken than needed
    torch.testing.assert_close(shares[moved], bound.expand(clients, -1)[moved], rtol=1e-6, atol=0)
    assert torch.equal(limited(logs.flip(0), cap).flip(0), cut)


def test_limits_by_hand():
    # of 5, b = 2/5: one is cut to 2/5 of the sum, so to 4 · (2/5) / (3/5) beside four of weight 1
    logs = torch.tensor([[32.0], [0.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    assert limited(logs, 2.0)[0].item() == pytest.approx(math.log(8 / 3))
    # of 6, b = 1/3: two are cut, four have 1/3 together, so each of the two has 4
    logs = torch.tensor([[32.0], [20.0], [0.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    assert limited(logs, 2.0)[:2, 0].tolist() == pytest.approx([math.log(4)] * 2)
    # one equal share each: all count alike
    assert limited(logs, 1.0)[:, 0].tolist() == pytest.approx([0.0] * 6)
    # of one, and of two, nobody is above a share of 1
    assert torch.equal(limited(logs[:1], 2.0), logs[:1]) and torch.equal(limited(logs[1:3], 2.0), logs[1:3])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.booleans())
def test_over_a_round_nobody_has_more_than_its_part_and_rows_stand_as_they_were(seed, clients, cap, subsets):
    g = torch.Generator().manual_seed(seed)
    logs = torch.randn(clients, 60, generator=g, dtype=torch.float64) * 3
    logs += (torch.rand(clients, 1, generator=g, dtype=torch.float64) * 2 - 1) * 16  # some are louder than others
    if subsets:
        logs[torch.rand(clients, 60, generator=g) < 0.3] = -torch.inf
    answered = torch.isfinite(logs)
    cut = Cap(cap).limit(logs)
    shares = torch.softmax(cut, 0).nan_to_num(0.0).sum(1)
    part = (answered * (cap / answered.sum(0).clamp_min(1).double()).clamp_max(1.0)).sum(1)
    assert (shares <= part * (1 + 1e-4)).all()
    fallen = torch.where(answered, logs - cut, 0.0).amax(1)
    torch.testing.assert_close(torch.where(answered, logs - fallen.unsqueeze(1), -torch.inf), cut)
    # nobody was lowered who did not have to be
    torch.testing.assert_close(shares[fallen > 0], part[fallen > 0], rtol=1e-4, atol=1e-9)
    assert (fallen >= 0).all()
    order = torch.randperm(clients, generator=g)
    assert torch.equal(Cap(cap).limit(logs[order]), cut[order])


def test_over_a_round_by_hand():
    # one of five shouts alike in all rows: it is left with two equal shares, as over a row
    logs = torch.zeros(5, 7, dtype=torch.float64)
    logs[2] = 32.0
    assert torch.softmax(Cap().limit(logs), 0)[2].tolist() == pytest.approx([0.4] * 7, rel=1e-5)
    # an expert who claims one of five rows, and no others, keeps it; over a row it would have 2/5 of it
    expert = torch.zeros(5, 5, dtype=torch.float64)
    expert[0, :1], expert[0, 1:] = 20.0, -20.0
    assert torch.equal(Cap().limit(expert), expert)
    assert torch.softmax(Cap(2.0, "row").limit(expert), 0)[0, 0].item() == pytest.approx(0.4)
    # whoever is silent has no part of anything
    expert[4] = -torch.inf
    assert torch.equal(Cap().limit(expert)[4], expert[4])
    # nine of twenty who shout have two equal shares each, and the others what is left
    many = torch.full((20, 3), -32.0, dtype=torch.float64)
    many[:9] = 32.0
    shares = torch.softmax(Cap().limit(many), 0)[:, 0]
    torch.testing.assert_close(shares, torch.tensor([0.1] * 9 + [0.1 / 11] * 11).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shares", [0.5, 0.0, -1.0, math.nan])
def test_a_cap_below_an_equal_share_is_refused(shares):
    with pytest.raises(UserError, match="max_client_share must be at least 1"):
        Cap.of(shares)
    assert Cap.of(None) is None
    with pytest.raises(UserError, match="max_client_share_over must be round or row"):
        Cap(2.0, "rows")
