"""Confidence by a domain classifier, which tells a client's own data from the proxy set."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.confidence.base import ClientView, Confidence, public_space
from fdl.utils.arguments import positive


class DomainClassifier(Confidence):
    """Weight by the odds that the proxy sample belongs to the client's data rather than to the proxy set.

    Each client fits a logistic regression of its own data against the proxy set in the public space. Both sides weigh
    alike in the fit, however many samples they have, so the log-odds estimate ``log p_k(x) / p_proxy(x)``; the
    denominator is the same for all clients and cancels. Source: the scores of FedAUX (Sattler et al.), without their
    noise for differential privacy: from as many odds as the space has dimensions the classifier can be read off, which
    for a site of few samples points at these. A site below `floor` therefore says nothing.

    Args:
        strength: inverse of the L2 penalty, scikit-learn's ``C``, on features whose unit is the proxy set's root mean
            square distance from its centre; > 0.
        sharpness: factor of the log-odds; > 0.
        by_size: add ``log n_k``, so that clients are compared by how many samples they expect around x, rather than
            by the share of theirs.
        floor: fewest samples of a site that says anything of its data; others are weighed like one without any.
    """

    name = "domain_classifier"
    needs_encoder = True
    reads_samples = True

    def __init__(self, strength: float = 5.0, sharpness: float = 1.0, by_size: bool = True, floor: int = 4):
        self.strength = positive("strength", strength)
        self.sharpness = positive("sharpness", sharpness)
        if floor < 1:
            raise UserError(f"floor must be at least 1, got {floor}")
        self.by_size, self.floor = by_size, floor

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """``sharpness · log-odds (+ log n_k)``; the least there is for a client with too few data."""
        if len(client.train) < self.floor:
            return torch.full((len(logits),), -math.inf)
        size = math.log(client.samples) if self.by_size else 0.0
        return self.sharpness * self.log_odds(client) + size

    def log_odds(self, client: ClientView) -> Tensor:
        """Log-odds of every proxy row, float32 [n_proxy], computed once for each client."""
        key = f"domain/{self.strength}"
        if key not in client.cache:
            from sklearn.linear_model import LogisticRegression

            encoder = public_space(client)
            proxy, own = encoder.encode_public(client.proxy), encoder.encode(client.train)
            centre = proxy.mean(axis=0)
            # one factor for all dimensions: the penalty means the same in every space, and no noise is blown up
            spread = float(np.sqrt(np.square(proxy - centre).sum(axis=1).mean())) or 1.0
            features = (np.concatenate([own, proxy]) - centre) / spread
            is_own = np.arange(len(features)) < len(own)
            model = LogisticRegression(C=self.strength, class_weight="balanced", max_iter=1000)
            odds = model.fit(features, is_own).decision_function(features[len(own) :])
            client.cache[key] = torch.from_numpy(odds.astype(np.float32))
        return client.cache[key]
