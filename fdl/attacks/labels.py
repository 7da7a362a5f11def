"""Label-distribution leakage: what a client's answers to the proxy set say of the classes that it holds."""

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
"""Share that an estimate gives to every class at least: the divergence from one that rules out a class is infinite."""


class LabelLeakage(Attack):
    """Estimates each client's label histogram from its answers to the proxy set, as an honest-but-curious server could.

    Three estimates: the mean probability of each class over the proxy set; the same over each class's most likely rows
    only, since a class that a model has never seen is never answered with confidence; and, where clients send their
    confidence in each row, the mean probability weighted by it. Each is compared with the truth by Kullback–Leibler
    divergence, in nats, and by total variation, as is the guess that every client holds what all hold together.

    Metrics are means over clients, and ``<estimate>/kl``, ``<estimate>/total_variation`` of each of
    ``mean``, ``confident``, ``weighted`` and ``guess``; an estimate below the guess is leakage.

    Args:
        label: as in `Attack`.
    """

    name = "label_leakage"

    def run(self, subject: AttackTarget) -> AttackResult:
        """Estimate every client's histogram.

        Raises:
            UserError: no client sends answers.
        """
        answered = [(c, a) for c in subject.clients if len(c.train) and (a := subject.answers(c)) is not None]
        if not answered:
            raise UserError(f"{self.label}: no client sends answers to a proxy set, so there is nothing to look at")
        classes = subject.server.num_classes
        counts = np.stack([client.train.labels.bincount(minlength=classes).numpy() for client, _ in answered])
        truth = counts / counts.sum(1, keepdims=True)
        estimates = [histograms(answers) for _, answers in answered]
        common = set.intersection(*(set(found) for found in estimates))
        tables = {name: np.stack([e[name] for e in estimates]) for name in estimates[0] if name in common}
        tables["guess"] = np.tile(counts.sum(0) / counts.sum(), (len(counts), 1))
        findings = AttackResult(arrays={"truth": truth, **tables})
        for name, table in tables.items():
            findings.metrics[f"{name}/kl"] = float(divergence(truth, table).mean())
            findings.metrics[f"{name}/total_variation"] = float(total_variation(truth, table).mean())
        names, ids = subject.server.classes, [client.id for client, _ in answered]
        shown = {name: table for name, table in tables.items() if name != "guess"}
        findings.figures["histograms"] = lambda: shares({"truth": truth, **shown}, ids, names)
        return findings


def histograms(answers: Responses) -> dict[str, np.ndarray]:
    """Estimates of the label histogram of whoever gave these answers, by name, each [C] with sum 1."""
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
    """KL(truth ‖ estimate) in nats of each row, [K]; no class of the estimate has less than a share of 1e-4."""
    estimate = np.maximum(estimate, _LEAST)
    estimate = estimate / estimate.sum(1, keepdims=True)
    return np.where(truth > 0, truth * np.log(np.maximum(truth, _LEAST**2) / estimate), 0.0).sum(1)


def total_variation(truth: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Half of the L1 distance of each row, [K], in [0, 1]."""
    return np.abs(truth - estimate).sum(1) / 2
