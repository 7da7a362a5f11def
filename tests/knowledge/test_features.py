"""Features of different widths in one space."""

import pytest
import torch

from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.transfer.features import FeatureMean, FeatureTransfer, principal, sketch
from fdl.losses.features import linear_cka, relational_distance
from fdl.messages import Features, QuantizedLogWeights


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_wide_sketch_keeps_inner_products():
    layers = {"a": draw(30, 5), "b": draw(30, 9, seed=1)}
    whole = torch.cat([layers["a"], layers["b"]], 1)
    seen = sketch(layers, 0, width=20000, seed=0)
    torch.testing.assert_close((seen @ seen.T / 20000).float(), whole @ whole.T / 14, atol=0.06, rtol=0.05)
    assert relational_distance(seen, whole).item() < 1e-3 and linear_cka(seen.float(), whole).item() < 0.01
    assert seen.var().item() == pytest.approx(1, rel=0.2)


def test_sketches_depend_on_client_layer_and_seed_only():
    layers = {"a": draw(4, 5)}
    same = sketch(layers, 3, 8, seed=1)
    assert torch.equal(same, sketch({"a": draw(4, 5)}, 3, 8, seed=1))
    for other in (sketch(layers, 2, 8, 1), sketch(layers, 3, 8, 2), sketch({"b": layers["a"]}, 3, 8, 1)):
        assert not torch.equal(same, other)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_running_sum_is_weighted_by_the_roots_of_shares(order):
    layers = [{"a": draw(4, width, seed=width)} for width in (3, 5, 7)]
    logs = torch.stack([draw(4, seed=9 + i) * 5 for i in range(3)]).double()
    for cap in (None, Cap(2.0, "row")):
        mean = FeatureMean(4, 6, seed=0, cap=cap)
        for i in order:
            mean.add(Features(layers[i]), logs[i], i)
        shares = torch.softmax(logs, 0)
        if cap is not None:  # what the largest of three has above 2/3 goes to the others in proportion
            largest = shares.amax(0)
            over = largest > 2 / 3
            others = shares * torch.where(over, (1 / 3) / (1 - largest), 1.0)
            shares = torch.where(over & (shares == largest), 2 / 3, others)
        expected = sum(shares[i].sqrt().unsqueeze(1) * sketch(layers[i], i, 6, 0) for i in range(3))
        got = mean.result()
        torch.testing.assert_close(got.values, expected.float())
    assert got.shares is None and got.known.all()


def test_apart_clients_keep_their_features_and_shares():
    mean = FeatureMean(3, 4, seed=0, apart=True)
    rows = torch.tensor([0, 2])
    mean.add(Features({"a": draw(3, 2)}), torch.zeros(3).double(), 5)
    mean.add(Features({"a": draw(2, 6)}, rows), torch.tensor([1.0, 9.0, 1.0]).double(), 2)
    got = mean.result()
    assert got.participants.tolist() == [2, 5] and got.values.shape == (3, 2, 4)
    share = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(got.shares[:, 0], torch.tensor([share, 0.0, share]))
    torch.testing.assert_close(got.shares.sum(1), torch.ones(3))


def test_a_confidence_of_its_own_counts_and_unknown_rows_are_known_to_be():
    sure = QuantizedLogWeights.quantize(torch.tensor([2.0, 2.0]))
    mean = FeatureMean(3, 4, seed=0)
    mean.add(Features({"a": draw(2, 2)}, torch.tensor([0, 1]), sure), torch.zeros(3).double(), 0)
    mean.add(Features({"a": draw(1, 2)}, torch.tensor([0])), torch.zeros(3).double(), 1)
    assert mean.result().known.tolist() == [True, True, False]
    assert torch.equal(mean.result().values[2], torch.zeros(4))
    assert FeatureMean(3, 4, 0).result() is None and FeatureMean(3, 4, 0, apart=True).result() is None


def test_a_confidence_beyond_bounds_is_refused():
    loud = QuantizedLogWeights.quantize(torch.full((3,), 400.0))
    with pytest.raises(RejectedMessageError, match="a confidence of features lies outside"):
        FeatureMean(3, 4, seed=0).check(Features({"a": draw(3, 2)}, None, loud))


def test_principal_components_are_those_of_the_covariance():
    values = draw(200, 6) @ torch.diag(torch.tensor([5.0, 0.1, 3.0, 0.1, 0.1, 1.0]))
    values = values - values.mean(0)
    basis = principal(values, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    kept = (values @ basis).square().sum()
    assert kept / torch.linalg.svdvals(values)[:3].square().sum() == pytest.approx(1, rel=1e-5)
    assert principal(values, 100).shape == (6, 6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": -1}, "layers must be at least 0"),
        ({"layers": []}, "layers must be at least 1"),
        ({"loss": "l7"}, "loss must be one of"),
        ({"weight": -1.0}, "weight must be"),
        ({"width": 0}, "width must be"),
        ({"components": 0}, "components must be"),
    ],
)
def test_settings_are_checked(settings, reason):
    with pytest.raises(UserError, match=reason):
        FeatureTransfer(**settings)
