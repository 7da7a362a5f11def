import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.neighbors import NearestNeighbors

from fdl.encoders.base import PCA, Pixels
from fdl.knowledge.confidence.base import LIMIT
from fdl.knowledge.confidence.density import Density, group_means, intrinsic_dimension, typical_distance
from tests.knowledge.clients import client, samples

RNG = np.random.default_rng(0)
PROXY = RNG.normal(size=(60, 4)).astype(np.float32)
OWN = RNG.normal(size=(25, 4)).astype(np.float32) + 0.5
LABELS = torch.tensor([0, 1, 1, 1, 1] * 5)
ANSWERS = torch.zeros(60, 2)


class Counting(Pixels):
    """Pixels that note how often they encode."""

    name = "counting"

    def __init__(self):
        super().__init__()
        self.encoded = []

    def encode(self, samples):
        self.encoded.append(len(samples))
        return super().encode(samples)


def weigh(confidence, own=OWN, proxy=PROXY, labels=None, encoder=None):
    owner = client(own, proxy, labels, encoder or Pixels())
    return confidence.log_weights(owner, torch.zeros(len(proxy), 2)).numpy()


@pytest.mark.parametrize("k", [1, 3, 100])
def test_neighbours_by_formula(k):
    typical = typical_distance(PROXY, k)
    distances = np.linalg.norm(PROXY[:, None] - OWN[None], axis=-1)
    nearest = np.sort(distances, axis=1)[:, :k].mean(axis=1)  # all 25 where k is 100
    expected = -2.5 * (nearest - typical) / 0.7
    np.testing.assert_allclose(weigh(Density(k=k, sharpness=2.5, scale=0.7)), expected.clip(-32, 32), atol=1e-4)


@pytest.mark.parametrize("per_class", [1, 2])
def test_centroids_by_formula(per_class):
    """Classes of well separated groups, so that k-means has one answer."""
    groups = np.array([[0, 0], [0, 100], [300, 0], [300, 300]], dtype=np.float32)
    sizes, classes = [3, 5, 2, 7], [0, 0, 1, 1]
    own = np.concatenate([g + RNG.normal(size=(n, 2)) for g, n in zip(groups, sizes)]).astype(np.float32)
    labels, group = np.repeat(classes, sizes), np.repeat(range(4), sizes)
    proxy = RNG.uniform(0, 300, size=(30, 2)).astype(np.float32)
    parts = [labels == c for c in (0, 1)] if per_class == 1 else [group == g for g in range(4)]
    centres, counts = np.stack([own[p].mean(axis=0) for p in parts]), [p.sum() for p in parts]
    distances = np.linalg.norm(proxy[:, None] - centres[None], axis=-1)
    expected = logsumexp(-(distances - typical_distance(proxy, 3)) / 50, axis=1, b=counts)
    confidence = Density("centroids", centroids_per_class=per_class, sharpness=1.0, scale=50.0, floor=0)
    np.testing.assert_allclose(weigh(confidence, own, proxy, torch.as_tensor(labels)), expected, atol=1e-3)


@pytest.mark.parametrize("method", ["neighbours", "centroids"])
def test_farther_counts_less(method):
    own = np.zeros((4, 2), dtype=np.float32) + RNG.normal(scale=0.01, size=(4, 2)).astype(np.float32)
    proxy = np.stack([np.linspace(0.1, 5, 30), np.zeros(30)], axis=1).astype(np.float32)
    assert (np.diff(weigh(Density(method, scale=1.0, floor=0), own, proxy)) < 0).all()


@pytest.mark.parametrize("method", ["neighbours", "centroids"])
@pytest.mark.parametrize("factor", [0.01, 1000.0])
def test_the_unit_of_length_does_not_matter(method, factor):
    expected = weigh(Density(method), labels=LABELS)
    found = weigh(Density(method), OWN * np.float32(factor), PROXY * np.float32(factor), labels=LABELS)
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_weights_are_shares_of_the_data():
    """Two clients of 1500 and 500 samples from different Gaussians: weights against the true posterior."""
    rng = np.random.default_rng(1)
    means, counts = np.array([[0, 0, 0], [1.5, 0, 0]]), (1500, 500)
    own = [rng.normal(size=(n, 3)) + m for m, n in zip(means, counts)]
    proxy = np.concatenate([rng.normal(size=(150, 3)) + m for m in means])
    densities = np.stack([n * np.exp(-((proxy - m) ** 2).sum(1) / 2) for m, n in zip(means, counts)])
    posterior = densities[0] / densities.sum(0)
    scores = np.stack(
        [weigh(Density(k=15, sharpness=1.0), o.astype(np.float32), proxy.astype(np.float32)) for o in own]
    )
    share = 1 / (1 + np.exp(scores[1] - scores[0]))
    assert abs(share.mean() - posterior.mean()) < 0.03
    assert np.sqrt(np.mean((share - posterior) ** 2)) < 0.1


def test_few_samples_and_copies_are_no_trouble():
    copies = np.ones((5, 4), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("neighbours", "centroids"):
            for own in (OWN[:1], copies):
                found = weigh(Density(method, k=5, floor=0), own)
                assert np.isfinite(found).all() and np.ptp(found) > 1
            assert np.isfinite(weigh(Density(method), OWN, np.ones((9, 4), dtype=np.float32))).all()
            assert np.isfinite(weigh(Density(method), OWN, PROXY[:1])).all()


def test_copies_count_for_a_centroid():
    once, twice = (weigh(Density("centroids", scale=1.0, floor=0), np.repeat(OWN[:3], n, axis=0)) for n in (1, 2))
    np.testing.assert_allclose(twice - once, np.log(2), atol=1e-4)


def test_a_client_without_data_is_silent():
    assert (weigh(Density(), OWN[:0]) == -LIMIT).all()


def test_without_an_encoder_it_is_pca_of_the_proxy_set():
    pca = PCA()
    pca.fit(samples(PROXY))
    owner = client(OWN, PROXY)
    found = Density().log_weights(owner, ANSWERS)
    np.testing.assert_array_equal(found.numpy(), weigh(Density(), encoder=pca))


def test_private_data_are_embedded_once_and_kept_by_their_owner():
    encoder = Counting()
    owners = [client(OWN[:n], PROXY, encoder=encoder) for n in (10, 20)]
    for _ in range(3):
        for owner in owners:
            Density().log_weights(owner, ANSWERS)
    assert encoder.encoded == [60, 10, 20]
    # two settings of one client do not share their results
    other = Density(sharpness=3.0).log_weights(owners[0], ANSWERS)
    np.testing.assert_allclose(other.numpy(), weigh(Density(sharpness=3.0), OWN[:10]))


def test_answers_to_another_proxy_set_are_a_mistake():
    with pytest.raises(ValueError, match="59 answers to a proxy set of 60"):
        Density().log_weights(client(OWN, PROXY), ANSWERS[:59])


def test_the_same_data_give_the_same_centroids():
    first, second = (weigh(Density("centroids"), labels=LABELS) for _ in range(2))
    assert np.array_equal(first, second)


def test_typical_distance_leaves_the_row_itself_out():
    line = np.arange(11, dtype=np.float32)[:, None] * 3
    assert typical_distance(line, 1) == pytest.approx(3)
    assert typical_distance(line, 2) == pytest.approx(3)
    assert typical_distance(line[:1], 3) == 1 and typical_distance(line * 0, 3) == 1
    nearest = NearestNeighbors(n_neighbors=4).fit(PROXY).kneighbors()[0]
    assert typical_distance(PROXY, 4) == pytest.approx(np.median(nearest.mean(axis=1)), rel=1e-5)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_intrinsic_dimension_of_a_flat_piece_in_a_larger_space(dimension):
    rng = np.random.default_rng(dimension)
    flat = rng.normal(size=(1500, dimension)) @ np.linalg.qr(rng.normal(size=(12, 12)))[0][:dimension]
    assert intrinsic_dimension(flat.astype(np.float32)) == pytest.approx(dimension, rel=0.15)


@pytest.mark.parametrize("proxy", [np.ones((50, 3)), np.ones((1, 3)), np.eye(3)[:2]])
def test_intrinsic_dimension_where_nothing_can_be_told(proxy):
    assert intrinsic_dimension(proxy.astype(np.float32)) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.integers(1, 9))
def test_groups_are_of_many_samples_and_hold_each_once(seed, count, least):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 3)).round(1)  # some are equal
    means = group_means(points, least) if count >= least else points.mean(0, keepdims=True)
    assert 1 <= len(means) <= max(count // least, 1)
    if least == 1:
        assert means is points
    # as powers of two of the rows: which of them are in a group can be read off its mean
    marks = np.concatenate([points, np.eye(count) * 1e-9], axis=1)  # too small to decide on a split
    if count >= least > 1:
        parts = group_means(marks, least)[:, 3:] * 1e9
        sizes = (1 / parts.max(1)).round()
        assert sizes.min() >= least and sizes.sum() == count and sizes.max() < 2 * least
        np.testing.assert_allclose(parts.T @ sizes, np.ones(count))
        np.testing.assert_allclose(np.sort(group_means(marks, least)[:, :3], 0), np.sort(means, 0), atol=1e-12)


def test_groups_are_the_same_to_the_bit_in_any_layout():
    points = np.random.default_rng(0).normal(size=(103, 7)).astype(np.float32)
    expected = group_means(points, 4)
    for other in (np.asfortranarray(points), points.copy()[::-1][::-1], np.repeat(points, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(group_means(other, 4), expected)


def test_a_small_site_is_measured_by_groups_and_one_below_a_group_says_nothing():
    few = OWN[:6]
    mean = few.astype(np.float64).mean(0)
    expected = np.linalg.norm(PROXY - mean, axis=1)
    confidence = Density(k=3, sharpness=1.0, scale=0.5)
    found = weigh(confidence, few)
    np.testing.assert_allclose(confidence.distances(found, PROXY), expected, atol=1e-4)
    assert (weigh(confidence, OWN[:3]) == -LIMIT).all()
    np.testing.assert_array_equal(weigh(Density(), OWN), weigh(Density(floor=0), OWN))  # 25 samples are enough
    assert not np.array_equal(weigh(Density(floor=26), OWN), weigh(Density(), OWN))


def test_no_centroid_stands_for_fewer_samples_than_a_group():
    # class 0 has five samples, class 1 one that lies on a proxy sample, and must not be seen in its weight
    own = np.concatenate([OWN[:5], PROXY[:1]])
    labels = torch.tensor([0] * 5 + [1])
    confidence = Density("centroids", centroids_per_class=1, scale=1.0, sharpness=1.0)
    found = weigh(confidence, own, labels=labels)
    np.testing.assert_array_equal(found, weigh(confidence, OWN[:5], labels=labels[:5]))
    assert weigh(Density("centroids", 1, 1, 1.0, 1.0, floor=0), own, labels=labels)[0] > found[0]
    assert (weigh(confidence, OWN[:3], labels=labels[:3]) == -LIMIT).all()
