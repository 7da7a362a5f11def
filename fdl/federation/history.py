"""The best round in a run's history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fdl.metrics.tasks import Task


def best_round(history: Sequence[Mapping[str, Any]], task: Task) -> int | None:
    """Return the round with the best score on validation data.

    Args:
        history: the records of all rounds.
        task: the task, whose score is compared.

    Returns:
        The round, the earliest of equals; None if no round was validated.
    """
    measured = [r for r in history if not math.isnan(r["metrics"].get(f"student/validation/{task.score}", math.nan))]
    return max(measured, key=lambda record: _validated(record, task))["round"] if measured else None


def _validated(record: Mapping[str, Any], task: Task) -> tuple[float, float]:
    """Return a sort key of validation scores: small sets often tie in accuracy, hardly ever in likelihood."""
    metrics = record["metrics"]
    score = metrics[f"student/validation/{task.score}"]
    tie = metrics.get(f"student/validation/{task.tie_breaker}", 0.0)
    return score if task.higher_is_better else -score, -tie
