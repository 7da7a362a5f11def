"""Questions to a run's history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdl.metrics.tasks import Task

if TYPE_CHECKING:
    pass


def best_round(history: Sequence[Mapping[str, Any]], task: Task) -> int | None:
    """Return the round of the best score on validation data, the earliest of equals; None where none was validated."""
    measured = [r for r in history if not math.isnan(r["metrics"].get(f"student/validation/{task.score}", math.nan))]
    return max(measured, key=lambda record: _validated(record, task))["round"] if measured else None


def _validated(record: Mapping[str, Any], task: Task) -> tuple[float, float]:
    """How good a round was on validation data: small sets often tie in accuracy, hardly ever in likelihood."""
    metrics = record["metrics"]
    score = metrics[f"student/validation/{task.score}"]
    tie = metrics.get(f"student/validation/{task.tie_breaker}", 0.0)
    return score if task.higher_is_better else -score, -tie
