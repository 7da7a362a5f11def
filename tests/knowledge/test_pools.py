"""What the methods of several architectures share."""

import torch

from fdl.knowledge.aggregation.pools import PoolAggregates, PoolMeans, interpolate, prefix_names, strip_prefix
from fdl.messages import Parameters


def test_models_of_one_message_come_apart_again():
    weights = {"mlp": {"a.weight": torch.rand(2), "b": torch.rand(1)}, "mlp-1": {"a.weight": torch.rand(3)}}
    one = prefix_names(weights)
    assert list(one) == ["mlp/a.weight", "mlp/b", "mlp-1/a.weight"]
    for pool, tensors in weights.items():
        assert strip_prefix(one, pool).keys() == tensors.keys()
        assert all(torch.equal(strip_prefix(one, pool)[name], tensor) for name, tensor in tensors.items())


def test_between_two_models_lies_a_line_and_counters_are_the_clients():
    mean = {"w": torch.tensor([0.1, 1.0]), "batches": torch.tensor(7)}
    learnt = {"w": torch.tensor([0.3, -1.0]), "batches": torch.tensor(9)}
    torch.testing.assert_close(interpolate(mean, learnt, 0.25)["w"], torch.tensor([0.15, 0.5]))
    for alpha, end in ((0.0, mean), (1.0, learnt)):
        assert torch.equal(interpolate(mean, learnt, alpha)["w"], end["w"])
    assert interpolate(mean, learnt, 1.0)["batches"] == 7


class Told:
    """Ranks of which another one said what it has before; without, one that says what it has."""

    def __init__(self, others=None):
        self.others, self.said = list(others or ()), []

    def sum(self, tensor):
        self.said.append(tensor.clone())
        if self.others:
            tensor.add_(self.others.pop(0))

    def max_(self, tensor):
        self.said.append(tensor.clone())
        if self.others:
            tensor.copy_(torch.maximum(tensor, self.others.pop(0)))


def test_means_of_two_processes_are_those_of_one():
    """A pool that was heard in one process only, and one that nobody was heard of, count as everywhere."""
    like = {pool: {"w": torch.zeros(n), "batches": torch.tensor(0)} for pool, n in (("a", 2), ("b", 3), ("c", 1))}
    trained = {0: ["a"], 1: ["a", "b"], 2: ["a"], 3: ["c"]}
    draw = lambda pool, k: {"w": torch.rand(len(like[pool]["w"])), "batches": torch.tensor(k + 1)}  # noqa: E731
    uploads = {
        k: Parameters(prefix_names({pool: draw(pool, k) for pool in trained[k]}), samples=k + 5) for k in range(3)
    }
    whole, here, there = (PoolMeans(like, trained) for _ in range(3))
    for client, upload in uploads.items():
        whole.add(upload, client)
        (here if client == 0 else there).add(upload, client)
    said = Told()
    there.reduce(said)
    here.reduce(Told(said.said))
    expected, found = whole.result(), here.result()
    assert list(found) == list(expected) == ["a", "b"]
    for pool in found:
        torch.testing.assert_close(found[pool]["w"], expected[pool]["w"])
        assert found[pool]["batches"] == expected[pool]["batches"]
    assert PoolMeans.reduces and not PoolAggregates.reduces  # rules need every upload, in every process
