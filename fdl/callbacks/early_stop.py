"""Early stopping of a run whose metric no longer improves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from fdl.callbacks.base import Callback
from fdl.errors import UserError
from fdl.metrics.tasks import TASKS

if TYPE_CHECKING:
    from fdl.federation.state import Federation


class EarlyStopping(Callback):
    """Ends the run when a metric has not improved for some rounds.

    Args:
        monitor: a metric of the round's record, e.g. ``"student/validation/accuracy"``, read in rounds with an
            evaluation; None for the student's score on validation data, which depends on the task.
        mode: ``"max"`` if larger values are better, ``"min"`` if smaller ones are; None for ``"max"`` with `monitor`,
            and for the direction of the score without it.
        patience: rounds without improvement after which the run ends.
        min_delta: smallest difference to the best value that counts as an improvement.

    Raises:
        UserError: an argument is out of range; during the run, an evaluated round lacks the metric.
    """

    name = "early_stopping"

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        patience: int = 5,
        min_delta: float = 0.0,
    ):
        if mode not in ("max", "min", None):
            raise UserError(f'mode must be "max" or "min", got {mode!r}')
        if monitor is not None and mode is None:
            mode = "max"
        if patience < 1:
            raise UserError(f"patience must be at least 1 round, got {patience}")
        if not min_delta >= 0:
            raise UserError(f"min_delta must be ≥ 0, got {min_delta}")
        self.monitor, self.mode, self.patience, self.min_delta = monitor, mode, patience, min_delta
        self.best: float | None = None
        self.best_round = 0

    def on_fit_start(self, loop: Federation) -> None:
        """Set the task's score and its direction as defaults."""
        task = TASKS[loop.server.task]
        self.monitor = self.monitor or f"student/validation/{task.score}"
        self.mode = self.mode or ("max" if task.higher_is_better else "min")

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Compare the metric with its best value, and stop the loop once patience is exhausted."""
        round, metrics = record["round"], record["metrics"]
        if self.monitor not in metrics:
            if round % loop.recipe.evaluation.every == 0:
                known = ", ".join(sorted(metrics)) or "none"
                raise UserError(f'early_stopping: round {round} has no metric "{self.monitor}"; it has: {known}')
            return
        value = metrics[self.monitor]
        if self._improves(value):
            self.best, self.best_round = value, round
        elif round - self.best_round >= self.patience:
            best = "been a number" if self.best is None else f"improved on {self.best:.6g} of round {self.best_round}"
            loop.stop(f"{self.monitor} has not {best} for {round - self.best_round} rounds")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its round."""
        return {"best": self.best, "best_round": self.best_round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best value and its round."""
        self.best, self.best_round = state["best"], state["best_round"]

    def _improves(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if self.mode == "max" else self.best - value
        return gain > self.min_delta
