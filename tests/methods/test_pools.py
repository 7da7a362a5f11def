"""What the methods of several architectures share."""

import torch

from fdl.methods.pools import between, part_of, together


def test_models_of_one_message_come_apart_again():
    weights = {"mlp": {"a.weight": torch.rand(2), "b": torch.rand(1)}, "mlp-1": {"a.weight": torch.rand(3)}}
    one = together(weights)
    assert list(one) == ["mlp/a.weight", "mlp/b", "mlp-1/a.weight"]
    for pool, tensors in weights.items():
        assert part_of(one, pool).keys() == tensors.keys()
        assert all(torch.equal(part_of(one, pool)[name], tensor) for name, tensor in tensors.items())


def test_between_two_models_lies_a_line_and_counters_are_the_clients():
    mean = {"w": torch.tensor([0.1, 1.0]), "batches": torch.tensor(7)}
    learnt = {"w": torch.tensor([0.3, -1.0]), "batches": torch.tensor(9)}
    torch.testing.assert_close(between(mean, learnt, 0.25)["w"], torch.tensor([0.15, 0.5]))
    for alpha, end in ((0.0, mean), (1.0, learnt)):
        assert torch.equal(between(mean, learnt, alpha)["w"], end["w"])
    assert between(mean, learnt, 1.0)["batches"] == 7
