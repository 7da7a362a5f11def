"""Metrics of a model's answers, and of a federation as a whole.

What a model answers is counted class by class: of n answers to C classes nothing larger than ``[n, C]`` or ``[C, C]``
is ever made. (The multi-class metrics of torchmetrics, made deterministic, compare every answer with every cell of the
confusion matrix: 9 n C² bytes, 90 GB for 10,000 answers to 1,000 classes.) Metrics of a federation are short formulas
over numbers that a run has already recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from fdl.catalog import suggest
from fdl.errors import UserError

# --- a model's answers


_ROWS = 1024
"""Answers of which probabilities are held at a time."""


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


def _top5(logits: Tensor, labels: Tensor) -> Tensor:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).float().mean()


def _macro_f1(logits: Tensor, labels: Tensor) -> Tensor:
    classes, predicted = logits.shape[1], logits.argmax(1)
    right = labels[predicted == labels].bincount(minlength=classes)
    occurrences = labels.bincount(minlength=classes) + predicted.bincount(minlength=classes)
    occurs = occurrences > 0
    return (2 * right[occurs].double() / occurrences[occurs]).mean()


def _ece(logits: Tensor, labels: Tensor) -> Tensor:
    # softmax here: torchmetrics takes logits that happen to lie in [0, 1] for probabilities
    confidence = torch.cat([part.softmax(1).amax(1) for part in logits.split(_ROWS)])
    right = (logits.argmax(1) == labels).long()
    return binary_calibration_error(confidence, right, n_bins=15, validate_args=False)


CLASSIFICATION_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": _accuracy,
    "nll": F.cross_entropy,
    "macro_f1": _macro_f1,
    "ece": _ece,
    "top5": _top5,
}
"""Metrics of logits ``[n, C]`` against labels ``[n]`` by name.

``accuracy`` and ``top5`` are shares of the rows; ``nll`` is in nats; ``macro_f1`` averages over the classes that occur
among the labels or the predictions; ``ece`` is the expected calibration error over 15 equal bins.
"""


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count answers by true and predicted class.

    Args:
        predicted: class of each answer, int64 [n].
        labels: true classes, int64 [n].
        classes: how many there are.

    Returns:
        int64 [classes, classes], true by predicted.
    """
    return (labels * classes + predicted).bincount(minlength=classes**2).reshape(classes, classes)


def classification(logits: Tensor, labels: Tensor, names: Sequence[str] = ("accuracy",)) -> dict[str, float]:
    """Measure a classifier's answers.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]`` int64, on the same device.
        names: which of `CLASSIFICATION_METRICS`.

    Returns:
        One number a name, in the order asked; ``nan`` for each where n is 0.

    Raises:
        UserError: a name is unknown.
    """
    for name in names:
        if name not in CLASSIFICATION_METRICS:
            raise UserError(f"unknown metric {name!r}{suggest(name, CLASSIFICATION_METRICS)}")
    if not len(labels):
        return dict.fromkeys(names, math.nan)
    logits = logits.float()
    return {name: CLASSIFICATION_METRICS[name](logits, labels).item() for name in names}


# --- a federation


def knowledge_transfer_efficiency(federated: float, central: float) -> float:
    """Return the federated model's score as a share of the centralised model's, ``nan`` where the latter is 0.

    Args:
        federated: accuracy, or another score where more is better and 0 is worst.
        central: the same score of a model trained on the pooled data.
    """
    return federated / central if central else math.nan


def recovered_gap(single: float, federated: float, central: float) -> float:
    """Return which share of the way from one site's score to the centralised score the federation goes.

    0 is a single site alone, 1 the centralised model; below 0 the federation harms. It is the knowledge-transfer
    efficiency of losses, too: a ratio of NLLs or perplexities has no such fixed points.

    Args:
        single: the score, or loss, of (the mean of) models trained at one site and never taught by others.
        federated: the same of the federated model.
        central: the same of a model trained on the pooled data.

    Returns:
        ``(federated - single) / (central - single)``, ``nan`` where the two ends are equal.
    """
    return (federated - single) / (central - single) if single != central else math.nan


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Estimate a difference from pairs, e.g. of runs with the same seed, with Student's t interval.

    Args:
        ours: a score a pair.
        theirs: what it is compared with, likewise.
        level: of confidence.

    Returns:
        The mean of ``ours - theirs`` and the ends of its interval, ``nan`` where there are fewer than two pairs.
    """
    from scipy.stats import t

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(differences)
    if count < 2:
        return (differences[0] if differences else math.nan), math.nan, math.nan
    mean = math.fsum(differences) / count
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    half = float(t.ppf(0.5 + level / 2, count - 1)) * spread
    return mean, mean - half, mean + half


def equity(gains: Sequence[float]) -> dict[str, float]:
    """Measure how evenly the participants gain.

    Args:
        gains: each participant's gain from taking part, e.g. its accuracy after minus before.

    Returns:
        ``variance`` of the gains (over the population, not an estimate), the ``minimum``, and ``jain``, the index
        ``(Σ g)² / (N Σ g²)``: 1 where all gain equally, 1/N where one takes it all, ``nan`` where a gain is negative
        or all are 0 (the index is not defined there). All are ``nan`` without participants.
    """
    if not gains:
        return {"variance": math.nan, "minimum": math.nan, "jain": math.nan}
    count, squares = len(gains), math.fsum(g * g for g in gains)
    mean, minimum = math.fsum(gains) / count, min(gains)
    return {
        "variance": math.fsum((g - mean) ** 2 for g in gains) / count,
        "minimum": minimum,
        "jain": math.fsum(gains) ** 2 / (count * squares) if minimum >= 0 and squares else math.nan,
    }


def series(records: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Pick one metric out of a run's records: round → value, of the rounds that measured it."""
    return {record["round"]: record["metrics"][metric] for record in records if metric in record.get("metrics", {})}


def traffic(records: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Pick the bytes sent since the start out of a run's records, up and down together, without set-up costs."""
    return {
        record["round"]: record["communication"]["upload_bytes"] + record["communication"]["download_bytes"]
        for record in records
    }


def rounds_to_target(history: Mapping[int, float], target: float, window: int = 3) -> int | None:
    """Return the first round whose running mean reaches the target.

    The mean is over this and the ``window - 1`` measured rounds before it, so that one lucky round does not count.
    Round 0, before the first exchange, is left out.

    Args:
        history: round → score, more is better, e.g. from `series`.
        target: the score to reach.
        window: how many measured rounds are averaged.

    Returns:
        The round, or None where the run ended before ("censored").
    """
    rounds = sorted(round for round in history if round > 0)
    for end in range(window, len(rounds) + 1):
        recent = [history[round] for round in rounds[end - window : end]]
        if math.fsum(recent) >= target * window:
            return rounds[end - 1]
    return None
