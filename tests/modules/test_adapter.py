"""Adapters: participant identity in, one space out."""

import pytest
import torch

from fdl.modules.adapter import ADAPTERS

WHO = torch.tensor([4, 0, 2])


def made(name, participants=5, inputs=6, outputs=3, rank=2):
    torch.manual_seed(0)
    return ADAPTERS[name](participants, inputs, outputs, rank).double()


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_each_participant_is_mapped_by_itself(name):
    adapter, features = made(name), torch.randn(7, 3, 6, dtype=torch.float64)
    for parameter in adapter.parameters():  # away from the start, where all participants are alike
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    mapped = adapter(features, WHO)
    assert mapped.shape == (7, 3, 3)
    alone = torch.cat([adapter(features[:, i : i + 1], WHO[i : i + 1]) for i in range(3)], dim=1)
    torch.testing.assert_close(mapped, alone)
    assert not torch.allclose(adapter(features[:, :1], WHO[:1]), adapter(features[:, :1], WHO[1:2]))


@pytest.mark.parametrize("name", ["affine", "film", "low_rank"])
def test_with_a_trunk_all_participants_start_alike(name):
    adapter, features = made(name), torch.randn(7, 1, 6, dtype=torch.float64)
    same = adapter(features.expand(-1, 3, -1), WHO)
    torch.testing.assert_close(same, same[:, :1].expand(-1, 3, -1))


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_gradients_reach_trunk_and_own_parameters_of_those_who_took_part(name):
    adapter = made(name)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1)
    adapter(torch.randn(7, 3, 6, dtype=torch.float64), WHO).square().sum().backward()
    for parameter in adapter.parameters():
        assert parameter.grad.abs().sum() > 0
        if parameter.shape[0] == 5:
            moved = parameter.grad.flatten(1).abs().sum(1) > 0
            assert moved.tolist() == [True, False, True, False, True]


def test_values_by_hand():
    linear, affine = made("linear", 2, 2, 1), made("affine", 2, 2, 1)
    features = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    linear.weight.data = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    linear.bias.data = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    assert linear(features, torch.tensor([1, 0])).flatten().tolist() == [3.0, 3.5]
    affine.trunk.weight.data, affine.trunk.bias.data = torch.ones(1, 2).double(), torch.zeros(1).double()
    affine.scale.data, affine.shift.data = torch.tensor([[2.0], [3.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
    assert affine(features, torch.tensor([0, 1])).flatten().tolist() == [6.0, 22.0]


def test_low_rank_is_the_trunk_plus_a_product():
    adapter, features = made("low_rank"), torch.randn(4, 1, 6, dtype=torch.float64)
    adapter.up.data = torch.randn_like(adapter.up)
    own = adapter.trunk.weight + adapter.up[2] @ adapter.down[2]
    expected = features[:, 0] @ own.T + adapter.trunk.bias
    torch.testing.assert_close(adapter(features, torch.tensor([2]))[:, 0], expected)
    assert made("low_rank", rank=100).down.shape == (5, 3, 6)
