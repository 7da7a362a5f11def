"""Label-distribution leakage: a client's label histogram, inferred from its predictions on the proxy set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fdl.attacks.base import Attack, AttackResult
from fdl.attacks.signals import probabilities
from fdl.errors import UserError
from fdl.utils.figures import shares

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.messages import Responses

_LEAST = 1e-4
"""Smallest fraction of any class in an estimate: the divergence from one that excludes a class is infinite."""


class LabelLeakage(Attack):
    """Estimates each client's label histogram from its predictions on the proxy set, as an honest-but-curious server.

    Three estimates: the mean probability of each class over the proxy set (``mean``); the same over the rows that are
    assigned to the class only, since a class without training samples is never predicted with confidence
    (``confident``); and, if clients send a confidence per row, the mean probability weighted by it (``weighted``). Each
    is compared with the true histogram by Kullback–Leibler divergence, in nats, and by total variation. The baseline
    ``guess`` is the histogram of all clients' data together.

    Metrics are ``<estimate>/kl`` and ``<estimate>/total_variation``, means over clients; an estimate with a smaller
    error than the guess is leakage.

    Args:
        label: name under which the results are recorded; default `name`.
    """

    name = "label_leakage"

    def run(self, subject: AttackTarget) -> AttackResult:
        """Estimate every client's histogram.

        Args:
            subject: the run.

        Raises:
            UserError: no client sends predictions on a proxy set.
        """
        answered = [
            (c, a) for c in subject.clients if len(c.train) and (a := subject.received_responses(c)) is not None
        ]
        if not answered:
            raise UserError(f"{self.label}: no client sends answers to a proxy set, so there is nothing to look at")
        classes = subject.server.num_classes
        counts = np.stack([client.train.labels.bincount(minlength=classes).numpy() for client, _ in answered])
        truth = counts / counts.sum(1, keepdims=True)
        estimates = [estimate_histograms(answers) for _, answers in answered]
        common = set.intersection(*(set(found) for found in estimates))
        tables = {name: np.stack([e[name] for e in estimates]) for name in estimates[0] if name in common}
        tables["guess"] = np.tile(counts.sum(0) / counts.sum(), (len(counts), 1))
        findings = AttackResult(arrays={"truth": truth, **tables})
        for name, table in tables.items():
            findings.metrics[f"{name}/kl"] = float(divergence(truth, table).mean())
            findings.metrics[f"{name}/total_variation"] = float(total_variation_distance(truth, table).mean())
        names, ids = subject.server.classes, [client.id for client, _ in answered]
        shown = {name: table for name, table in tables.items() if name != "guess"}
        findings.figures["histograms"] = lambda: shares({"truth": truth, **shown}, ids, names)
        return findings


def estimate_histograms(answers: Responses) -> dict[str, np.ndarray]:
    """Estimate the label histogram of a client from its predictions.

    Args:
        answers: the client's predictions on the proxy set.

    Returns:
        Estimates by name, each [C] with sum 1.
    """
    p = probabilities(answers)
    best = p.argmax(1)
    confident = np.bincount(best, weights=p[np.arange(len(p)), best], minlength=p.shape[1])
    found = {"mean": p.mean(0), "confident": confident / confident.sum()}
    if answers.confidence is not None:
        weights = answers.confidence.values().double().numpy()
        weights = np.exp(weights - weights.max())
        found["weighted"] = weights @ p / weights.sum()
    return found


def divergence(truth: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Compute KL(truth ‖ estimate) per row, with fractions of the estimate of at least 1e-4.

    Args:
        truth: true histograms, [K, C].
        estimate: estimated histograms, [K, C].

    Returns:
        Divergences in nats, [K].
    """
    estimate = np.maximum(estimate, _LEAST)
    estimate = estimate / estimate.sum(1, keepdims=True)
    return np.where(truth > 0, truth * np.log(np.maximum(truth, _LEAST**2) / estimate), 0.0).sum(1)


def total_variation_distance(truth: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Compute half of the L1 distance per row.

    Args:
        truth: true histograms, [K, C].
        estimate: estimated histograms, [K, C].

    Returns:
        Distances in [0, 1], [K].
    """
    return np.abs(truth - estimate).sum(1) / 2
