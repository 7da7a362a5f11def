"""Centroids with counts, and to which of them proxy samples belong."""

import dataclasses

import numpy as np
import pytest
import torch

from fdl.encoders.base import Pixels
from fdl.errors import UserError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.transfer.extraction import Extracted
from fdl.knowledge.transfer.prototypes import PrototypeKnowledge, PrototypePool, PrototypeTransfer, centroids
from fdl.messages import Prototypes, QuantizedLogWeights
from tests.knowledge.clients import client

POINTS = np.array([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0], [5.0, 5.0]], np.float32)
GROUPS = np.array([0, 0, 0, 0, 3])


def test_one_centroid_is_the_mean_and_two_find_the_clusters():
    values, groups, members = centroids(POINTS, GROUPS, 1)
    assert groups.tolist() == [0, 3] and members.tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(values, torch.tensor([[5.0, 1.5], [5.0, 5.0]]))
    values, groups, members = centroids(POINTS, GROUPS, 2)
    assert groups.tolist() == [0, 0, 3]
    assert sorted(values[:2].tolist()) == [[0.0, 1.0], [10.0, 2.0]]
    torch.testing.assert_close(values[members[:4]], torch.tensor([[0.0, 1], [0, 1], [10, 2], [10, 2]]))


def test_weights_move_centroids_and_equal_points_are_one():
    values, _, _ = centroids(POINTS[:2], GROUPS[:2], 1, np.array([3.0, 1.0]))
    torch.testing.assert_close(values, torch.tensor([[0.0, 0.5]]))
    same = np.repeat(POINTS[:1], 4, axis=0)
    assert len(centroids(same, np.zeros(4, int), 3)[0]) == 1


def extracted(logits, embedding):
    return Extracted(torch.as_tensor(logits), torch.as_tensor(embedding), {})


def test_a_client_sends_means_counts_and_how_sure_it_is():
    owner = client(POINTS[:3], POINTS, torch.tensor([0, 0, 1]), encoder=Pixels())
    sure = extracted(torch.tensor([[0.0, 0.0], [0.0, 0.0], [-50.0, 50.0]]), torch.zeros(3, 1))
    got = PrototypeTransfer(count=1, floor=1).message(owner, lambda: sure, sure)
    assert got.values.tolist() == [[0.0, 1.0], [10.0, 0.0]]
    assert got.labels.tolist() == [0, 1] and got.counts.tolist() == [2, 1]
    torch.testing.assert_close(got.confidence.values(), torch.tensor([-0.6931, 0.0]), atol=2e-3, rtol=0)
    got.validate()
    concepts = PrototypeTransfer(count=1, by="concept", floor=3).message(owner, lambda: sure, sure)
    assert concepts.labels.tolist() == [-1] and concepts.counts.tolist() == [3]
    # the mean of one sample is that sample: it stays at the site, and by default those of fewer than four do
    assert PrototypeTransfer(count=1, floor=2).message(owner, lambda: sure, sure).labels.tolist() == [0]
    assert len(PrototypeTransfer(count=1).message(owner, lambda: sure, sure).values) == 0


def test_in_the_embedding_space_they_are_standardised_over_the_proxy_set():
    owner = client(POINTS[:2], POINTS, torch.tensor([0, 1]))
    own = extracted(torch.zeros(2, 2), torch.tensor([[3.0], [7.0]]))
    proxy = extracted(torch.zeros(2, 2), torch.tensor([[1.0], [5.0]]))
    got = PrototypeTransfer(count=1, space="embedding", floor=1).message(owner, lambda: own, proxy)
    assert got.values.flatten().tolist() == [0.0, 2.0]


def test_a_client_without_data_sends_none():
    owner = client(POINTS[:0], POINTS, encoder=Pixels())
    got = PrototypeTransfer().message(owner, lambda: None, extracted(torch.zeros(5, 2), torch.zeros(5, 7)))
    assert got.values.shape == (0, 2)
    got.validate()


def server(seed=0):
    owner = client(POINTS, POINTS, encoder=Pixels())
    owner.seed = seed
    return owner


def prototypes(values, labels, counts):
    return Prototypes(torch.tensor(values), torch.tensor(labels), torch.tensor(counts))


def test_the_server_merges_by_class_and_counts():
    pool = PrototypePool(server(), PrototypeTransfer(count=1), 64)
    pool.add(prototypes([[0.0, 0.0], [1.0, 1.0]], [0, 1], [1, 5]), 1)
    pool.add(prototypes([[4.0, 0.0]], [0], [3]), 0)
    got = pool.result()
    assert got.labels.tolist() == [0, 1] and got.participants is None
    torch.testing.assert_close(got.values, torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
    assert got.weights.tolist() == [4, 5]
    assert PrototypePool(server(), PrototypeTransfer(), 64).result() is None


def test_no_client_has_more_than_two_equal_shares_of_a_class_whatever_it_declares():
    sure = QuantizedLogWeights.quantize(torch.full((1,), 32.0))
    for cap, expected in (
        (None, 10.0),
        (Cap(2.0, "row"), 5.0),
    ):  # of four clients the loud one has 1/2, of two all it wants
        pool = PrototypePool(server(), PrototypeTransfer(count=1), 64, cap)
        for client_id in range(3):
            pool.add(prototypes([[0.0, 0.0], [0.0, 0.0]], [0, 1], [4, 4]), client_id)
        loud = dataclasses.replace(prototypes([[10.0, 0.0]], [0], [4]), confidence=sure)
        pool.add(loud, 3)
        got = pool.result()
        torch.testing.assert_close(got.values[0], torch.tensor([expected, 0.0]))
        assert got.weights[1] == 12 and got.values[1].tolist() == [0.0, 0.0]
    assert got.weights[0] == pytest.approx(24)  # 12 of the honest, as much again


def test_in_their_own_spaces_clients_stay_apart():
    pool = PrototypePool(server(), PrototypeTransfer(count=1, space="embedding"), 8)
    pool.add(prototypes([[0.0, 1.0, 2.0]], [1], [2]), 7)
    pool.add(prototypes([[1.0], [2.0]], [0, 1], [1, 1]), 3)
    got = pool.result()
    assert got.participants.tolist() == [3, 3, 7] and got.values.shape == (3, 8)
    assert got.labels.tolist() == [0, 1, 1]


def test_samples_belong_by_answers_and_nearness():
    known = PrototypeKnowledge(
        torch.tensor([[0.0], [4.0], [9.0]]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 1.0])
    )
    probabilities = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    near = known.assignment(probabilities, torch.tensor([[3.0], [0.0]]))
    torch.testing.assert_close(near, torch.tensor([[0.0, 0.7, 0.3], [1 / 3, 1 / 3, 1 / 3]]))
    by_weight = known.assignment(probabilities, None)
    torch.testing.assert_close(by_weight[0], torch.tensor([0.7 * 0.25, 0.7 * 0.75, 0.3]))
    concepts = PrototypeKnowledge(known.values, torch.tensor([-1, -1, -1]), known.weights)
    assert concepts.assignment(probabilities, torch.tensor([[8.0], [1.0]])).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"count": 0}, "count must be"),
        ({"space": "private"}, "space must be"),
        ({"by": "site"}, "by must be"),
        ({"loss": "l7"}, "loss must be"),
        ({"weight": -1.0}, "weight must be"),
        ({"temperature": 0.0}, "temperature must be"),
    ],
)
def test_settings_are_checked(settings, reason):
    with pytest.raises(UserError, match=reason):
        PrototypeTransfer(**settings)
