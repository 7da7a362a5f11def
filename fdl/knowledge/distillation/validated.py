"""Early stopping and restoring of the best weights of a fit, by the server's validation samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdl.metrics.tasks import TASKS
from fdl.participants import Server, copy_of
from fdl.state.weights import load_into

if TYPE_CHECKING:
    from lightning import LightningModule


class BestOnValidation:
    """Early stopping of a fit of the server, which restores the best weights by its labelled validation samples.

    Of models with the same score, e.g. accuracy, the one with the lower tie breaker, e.g. NLL, is the better: small
    sets often tie. The model before the fit is a candidate, too.

    Args:
        server: holds the validation samples.
        module: the model that will be trained.
        every: steps between two evaluations, ≥ 1.
        patience: steps without gain after which the fit ends, ≥ 1; None for no early end.

    Attributes:
        best_step: the step of the best model so far; 0 for the model before the fit.
        steps: number of steps so far.
    """

    def __init__(self, server: Server, module: LightningModule, every: int, patience: int | None):
        self.server, self.module, self.every, self.patience = server, module, every, patience
        self.steps = self.best_step = self._evaluated_at = 0
        self._best, self._kept = self._score(), copy_of(module)

    def __call__(self, steps: int) -> bool:
        """Evaluate the model after every `every` steps; return whether the fit should end.

        Args:
            steps: number of steps so far.
        """
        self.steps = steps
        if steps % self.every == 0:
            self._evaluate()
        return self.patience is not None and steps - self.best_step >= self.patience

    def restore(self) -> None:
        """Evaluate a last time, and load the best weights into the module."""
        self._evaluate()
        load_into(self.module, self._kept)

    def _evaluate(self) -> None:
        if self._evaluated_at == self.steps:
            return
        self._evaluated_at, score = self.steps, self._score()
        if score > self._best:
            self._best, self._kept, self.best_step = score, copy_of(self.module), self.steps

    def _score(self) -> tuple[float, ...]:
        """The score and the negative tie breaker, if any, in order of precedence; higher is better."""
        task = TASKS[self.server.task]
        names = (task.score,) if task.tie_breaker is None else (task.score, task.tie_breaker)
        values = task.measure(self.server, self.module, self.server.validation, names)
        first = values[task.score] if task.higher_is_better else -values[task.score]
        return first, *(-values[name] for name in names[1:])
