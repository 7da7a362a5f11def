import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.errors import UserError
from fdl.knowledge.shares import checked_cap, limited


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
    assert torch.equal(limited(logs.flip(0), cap).flip(0), cut) and limited(logs, None) is logs


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


@pytest.mark.parametrize("cap", [0.5, 0.0, -1.0, math.nan])
def test_a_cap_below_an_equal_share_is_refused(cap):
    with pytest.raises(UserError, match="cap must be at least 1"):
        checked_cap(cap)
