"""Metrics of federations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def knowledge_transfer_efficiency(federated: float, central: float) -> float:
    """Return the federated model's score as a share of the centralised model's, ``nan`` where the latter is 0.

    Args:
        federated: accuracy, or another score where more is better and 0 is worst.
        central: the same score of a model trained on the pooled data.

    Example:
        >>> knowledge_transfer_efficiency(federated=0.81, central=0.9)
        0.9
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

    Example:
        >>> recovered_gap(single=0.5, federated=0.875, central=1.0)
        0.75
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
    """Measure how evenly the participants gain.

    Args:
        gains: each participant's gain from taking part, e.g. its accuracy after minus before.

    Returns:
        ``variance`` of the gains (over the population, not an estimate), the ``minimum``, and ``jain``, the index
        ``(Σ g)² / (N Σ g²)``: 1 where all gain equally, 1/N where one takes it all, ``nan`` where a gain is negative
        or all are 0 (the index is not defined there). All are ``nan`` without participants.

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
    """Pick one metric out of a run's records: round → value, of the rounds that measured it.

    Example:
        >>> records = [{"round": 1, "metrics": {"student/test/accuracy": 0.8}}, {"round": 2, "metrics": {}}]
        >>> metric_by_round(records, "student/test/accuracy")
        {1: 0.8}
    """
    return {record["round"]: record["metrics"][metric] for record in records if metric in record.get("metrics", {})}


def bytes_by_round(records: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Pick the bytes sent since the start out of a run's records, up and down together, without set-up costs.

    Example:
        >>> bytes_by_round([{"round": 1, "communication": {"upload_bytes": 70, "download_bytes": 30}}])
        {1: 100}
    """
    return {
        record["round"]: record["communication"]["upload_bytes"] + record["communication"]["download_bytes"]
        for record in records
    }


def rounds_to_target(history: Mapping[int, float], target: float, window: int = 3) -> int | None:
    """Return the first round whose running mean reaches the target.

    The mean is over this and the ``window - 1`` measured rounds before it, so that one lucky round does not count.
    Round 0, before the first exchange, is left out.

    Args:
        history: round → score, more is better, e.g. from `metric_by_round`.
        target: the score to reach.
        window: how many measured rounds are averaged.

    Returns:
        The round, or None where the run ended before ("censored").

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
