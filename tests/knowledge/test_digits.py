"""What confidences are for, on real digits: five very different clients answer a proxy set."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from fdl.encoders.base import PCA, Pixels
from fdl.knowledge.aggregation.means import ResponseMean
from fdl.knowledge.confidence.base import Entropy, Product
from fdl.knowledge.confidence.density import Density
from fdl.knowledge.confidence.domain_classifier import DomainClassifier
from fdl.messages import QuantizedLogWeights, Responses
from tests.knowledge.clients import client

CLIENTS, PROXIES = 5, 400


def specialist(x, y):
    """A small network; its probabilities over all ten classes."""
    model = MLPClassifier((64,), max_iter=60, learning_rate_init=5e-3, random_state=0).fit(x, y)

    def answer(queries):
        p = np.zeros((len(queries), 10))
        p[:, model.classes_] = model.predict_proba(queries)
        return torch.as_tensor(p, dtype=torch.float32)

    return answer


@pytest.fixture(scope="module", params=[0, 1])
def federation(request):
    """Clients by Dirichlet α = 0.1 over each class, what they answer, and the accuracy of pooled training."""
    rng = np.random.default_rng(request.param)
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target
    order = rng.permutation(len(y))
    proxy, train = order[:PROXIES], order[PROXIES:]
    owner = np.empty(len(train), dtype=int)
    for c in range(10):
        members = np.flatnonzero(y[train] == c)
        owner[members] = rng.choice(CLIENTS, size=len(members), p=rng.dirichlet([0.1] * CLIENTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        parts = [train[owner == k] for k in range(CLIENTS) if (owner == k).sum() > 1]
        answers = [specialist(x[part], y[part])(x[proxy]) for part in parts]
        central = float((specialist(x[train], y[train])(x[proxy]).argmax(1).numpy() == y[proxy]).mean())
    clients = [client(x[part], x[proxy], torch.as_tensor(y[part]), num_classes=10) for part in parts]
    return clients, answers, y[proxy], central


def fraction(federation, confidence=None, encoder=None):
    """Accuracy of the aggregate on the proxy set as a fraction of centralised accuracy."""
    clients, answers, labels, central = federation
    mean = ResponseMean(PROXIES, 10, weighted=confidence is not None, cap=None)  # what a confidence tells by itself
    for i, (owner, answer) in enumerate(zip(clients, answers)):
        sent = None
        if confidence is not None:
            owner.encoder, owner.cache = encoder, {}
            sent = QuantizedLogWeights.quantize(confidence.log_weights(owner, answer.clamp_min(1e-9).log()))
        mean.add(Responses(answer, "probabilities", confidence=sent), i)
    return float((mean.result().values.argmax(1).numpy() == labels).mean()) / central


def fitted(encoder, federation):
    encoder.fit(federation[0][0].proxy)
    return encoder


def test_density_finds_who_knows(federation):
    plain = fraction(federation)
    assert plain < 0.92 and fraction(federation, Entropy()) < 0.92
    for encoder in (None, fitted(PCA(16), federation), Pixels()):
        assert fraction(federation, Density(), encoder) > 0.98
    assert fraction(federation, Density("centroids"), Pixels()) > 0.97
    assert fraction(federation, DomainClassifier(), Pixels()) > 0.95
    assert fraction(federation, Product([Density(), Entropy(1.0)]), Pixels()) > 0.98
