"""The best of the models that a fit passes through, by the server's validation samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdl.metrics.tasks import TASKS
from fdl.participants import Server, copy_of
from fdl.state.weights import load_into

if TYPE_CHECKING:
    from lightning import LightningModule


class BestOnValidation:
    """Watches a fit of the server's, and goes back to the weights that did best on its labelled validation samples.

    Of models with the same score, e.g. accuracy, the one with the lower tie breaker, e.g. NLL, is the better: small
    sets often tie. The model as it is when this is made is a candidate, too.

    Args:
        server: whose validation samples are asked.
        module: that will be trained.
        every: steps between two looks, ≥ 1.
        patience: steps without gain after which the fit is to end, ≥ 1; None for no such end.

    Attributes:
        best_step: the step of the best model so far; 0 is the one that it began with.
        steps: how many have been taken.
    """

    def __init__(self, server: Server, module: LightningModule, every: int, patience: int | None):
        self.server, self.module, self.every, self.patience = server, module, every, patience
        self.steps = self.best_step = self._evaluated_at = 0
        self._best, self._kept = self._score(), copy_of(module)

    def __call__(self, steps: int) -> bool:
        """Look at the model where it is time to; returns whether the fit should end."""
        self.steps = steps
        if steps % self.every == 0:
            self._evaluate()
        return self.patience is not None and steps - self.best_step >= self.patience

    def restore(self) -> None:
        """Look a last time, and give the module its best weights."""
        self._evaluate()
        load_into(self.module, self._kept)

    def _evaluate(self) -> None:
        if self._evaluated_at == self.steps:
            return
        self._evaluated_at, score = self.steps, self._score()
        if score > self._best:
            self._best, self._kept, self.best_step = score, copy_of(self.module), self.steps

    def _score(self) -> tuple[float, ...]:
        """Numbers of which more is better, the first one first."""
        task = TASKS[self.server.task]
        names = (task.score,) if task.tie_breaker is None else (task.score, task.tie_breaker)
        values = task.measure(self.server, self.module, self.server.validation, names)
        first = values[task.score] if task.higher_is_better else -values[task.score]
        return first, *(-values[name] for name in names[1:])
