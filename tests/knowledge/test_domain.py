import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from fdl.encoders.base import Pixels
from fdl.knowledge.confidence.base import LIMIT
from fdl.knowledge.confidence.domain_classifier import DomainClassifier
from tests.knowledge.clients import client

RNG = np.random.default_rng(0)
PROXY = RNG.normal(size=(80, 3)).astype(np.float32) * 2
OWN = (RNG.normal(size=(20, 3)) + np.array([2, 0, 0])).astype(np.float32)
ANSWERS = torch.zeros(80, 2)


def weigh(confidence, own=OWN, proxy=PROXY):
    owner = client(own, proxy, encoder=Pixels())
    return confidence.log_weights(owner, torch.zeros(len(proxy), 2)).numpy()


def test_it_is_a_balanced_logistic_regression():
    """Both sides weigh alike: the same fit with explicit weights, in the unit that the penalty refers to."""
    centre = PROXY.mean(axis=0)
    unit = np.sqrt(np.mean(np.sum((PROXY - centre) ** 2, axis=1)))
    x, y = (np.concatenate([OWN, PROXY]) - centre) / unit, np.repeat([1, 0], [20, 80])
    weights = np.repeat([100 / 40, 100 / 160], [20, 80])
    model = LogisticRegression(C=2.0, max_iter=1000).fit(x, y, sample_weight=weights)
    odds = np.log(model.predict_proba(x[20:])).dot([-1, 1])
    found = weigh(DomainClassifier(strength=2.0, sharpness=1.5, by_size=False))
    np.testing.assert_allclose(found, 1.5 * odds, atol=2e-3)


def test_what_looks_like_the_clients_data_counts_more():
    found = weigh(DomainClassifier())
    towards = PROXY[:, 0]
    assert np.corrcoef(found, towards)[0, 1] > 0.9


def test_size_is_added_as_log_n():
    difference = weigh(DomainClassifier()) - weigh(DomainClassifier(by_size=False))
    np.testing.assert_allclose(difference, np.log(20), atol=1e-5)


def test_the_unit_of_length_does_not_matter():
    found, expected = weigh(DomainClassifier(), OWN * 1000, PROXY * 1000), weigh(DomainClassifier())
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_few_samples_are_no_trouble_and_none_are_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(weigh(DomainClassifier(floor=1), OWN[:1])).all()
        assert np.isfinite(weigh(DomainClassifier(), OWN, np.ones((9, 3), dtype=np.float32))).all()
        assert (weigh(DomainClassifier(), OWN[:0]) == -LIMIT).all()
        assert (weigh(DomainClassifier(), OWN[:3]) == -LIMIT).all()  # below the floor


def test_it_is_fitted_once_for_each_client():
    owner = client(OWN, PROXY, encoder=Pixels())
    confidence = DomainClassifier()
    first = confidence.log_odds(owner)
    confidence.log_weights(owner, ANSWERS)
    assert confidence.log_odds(owner) is first
