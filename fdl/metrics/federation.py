"""Metrics of federations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def knowledge_transfer_efficiency(federated: float, central: float) -> float:
    """Compute the knowledge-transfer efficiency (KTE): the federated score as a fraction of the centralised one.

    Args:
        federated: accuracy of the federated model, or another score for which more is better and 0 is worst.
        central: the same score of a model trained on the pooled data.

    Returns:
        ``federated / central``; ``nan`` if `central` is 0.

    Example:
        >>> knowledge_transfer_efficiency(federated=0.81, central=0.9)
        0.9
    """
    return federated / central if central else math.nan


def recovered_gap(single: float, federated: float, central: float) -> float:
    """Compute the recovered gap: the fraction of the distance from single-site to centralised training covered.

    0 is a single site alone, 1 the centralised model; below 0, federation does harm. Unlike KTE it also applies to
    losses, for which a ratio of NLLs or perplexities has no such fixed points.

    Args:
        single: score or loss of models trained at one site without any federation (mean over sites).
        federated: score or loss of the federated model.
        central: score or loss of a model trained on the pooled data.

    Returns:
        ``(federated - single) / (central - single)``; ``nan`` if `central` equals `single`.

    Example:
        >>> recovered_gap(single=0.5, federated=0.875, central=1.0)
        0.75
    """
    return (federated - single) / (central - single) if single != central else math.nan


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Estimate the mean of paired differences, e.g. of runs with equal seeds, with Student's t interval.

    Args:
        ours: one score per pair.
        theirs: the score it is compared with, per pair.
        level: confidence level of the interval, in (0, 1).

    Returns:
        The mean of ``ours - theirs`` and the two ends of its interval, which are ``nan`` for fewer than two pairs.

    Example:
        >>> mean, low, high = paired_difference([0.90, 0.92, 0.94], [0.89, 0.90, 0.91])
        >>> print(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        0.020 [-0.005, 0.045]
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
    """Measure how evenly gains are distributed over participants.

    Args:
        gains: one gain per participant, e.g. its accuracy after the federation minus before.

    Returns:
        ``variance``, the population variance of the gains; ``minimum``; and ``jain``, Jain's fairness index
        ``(Σ g)² / (N Σ g²)``: 1 if all gain equally, 1/N if only one gains, ``nan`` if a gain is negative or all are 0
        (where the index is undefined). All are ``nan`` if `gains` is empty.

    Example:
        >>> equity([0.0, 0.5])
        {'variance': 0.0625, 'minimum': 0.0, 'jain': 0.5}
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


def metric_by_round(records: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Collect one metric from a run's records.

    Args:
        records: entries of the run's history.
        metric: name of the metric, e.g. ``"student/accuracy"``.

    Returns:
        Value by round, for the rounds in which it was measured.

    Example:
        >>> records = [{"round": 1, "metrics": {"student/test/accuracy": 0.8}}, {"round": 2, "metrics": {}}]
        >>> metric_by_round(records, "student/test/accuracy")
        {1: 0.8}
    """
    return {record["round"]: record["metrics"][metric] for record in records if metric in record.get("metrics", {})}


def bytes_by_round(records: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Collect the cumulative bytes sent, uploads and downloads together, without set-up costs.

    Args:
        records: entries of the run's history.

    Returns:
        Bytes since the start of the run by round.

    Example:
        >>> bytes_by_round([{"round": 1, "communication": {"upload_bytes": 70, "download_bytes": 30}}])
        {1: 100}
    """
    return {
        record["round"]: record["communication"]["upload_bytes"] + record["communication"]["download_bytes"]
        for record in records
    }


def rounds_to_target(history: Mapping[int, float], target: float, window: int = 3) -> int | None:
    """Find the first round whose running mean reaches a target.

    The mean is over this round and the ``window - 1`` measured rounds before it, so that a single lucky round does not
    count. Round 0, before the first exchange, is left out.

    Args:
        history: score by round, more is better, e.g. from `metric_by_round`.
        target: the score to reach.
        window: number of measured rounds averaged.

    Returns:
        The round; None if the target was not reached ("censored").

    Example:
        >>> history = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.9, 5: 0.9}
        >>> rounds_to_target(history, 0.8), rounds_to_target(history, 0.8, window=1)
        (4, 2)
    """
    rounds = sorted(round for round in history if round > 0)
    for end in range(window, len(rounds) + 1):
        recent = [history[round] for round in rounds[end - window : end]]
        if math.fsum(recent) >= target * window:
            return rounds[end - 1]
    return None
