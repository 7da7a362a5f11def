"""Our rules against byzfl, whose Krum and Multi-Krum count n − f − 1 neighbours where the paper counts n − f − 2."""

import pytest
import torch

from fdl.robust.coordinate_wise import Median, TrimmedMean
from fdl.robust.distance_based import GeometricMedian, Krum, MultiKrum, NormClipping
from tests.robust.votes import decide

byzfl = pytest.importorskip("byzfl", reason="byzfl is not installed; pip install byzfl")


class Clipped:
    def __call__(self, x):
        return byzfl.Average()(byzfl.Clipping(c=2.5)(x.copy()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [9, 10])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Median(), byzfl.Median()),
        (TrimmedMean, byzfl.TrMean(f=2)),
        (GeometricMedian(), byzfl.GeometricMedian(nu=1e-9, T=2000)),
        (Krum(num_attackers=1), byzfl.Krum(f=2)),
        (MultiKrum(num_attackers=1, keep=7), None),
        (NormClipping(2.5), Clipped()),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_as_byzfl(ours, theirs, n, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = ours(2 / n) if ours is TrimmedMean else ours
    theirs = theirs or byzfl.MultiKrum(f=n - 7)
    if isinstance(ours, MultiKrum) and not isinstance(ours, Krum):
        ours = MultiKrum(num_attackers=n - 8, keep=7)  # byzfl keeps n − f and counts n − f − 1
    expected = torch.as_tensor(theirs(x.numpy()))
    torch.testing.assert_close(decide(ours, x), expected.double(), rtol=1e-5, atol=1e-5)
