"""Tasks: the metrics that apply to each kind of data, and which of them is the score.

This module does not import torch, so that a recipe's metrics can be checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdl.errors import UserError
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.metrics.predictor import Predictor

Measure = Callable[["Predictor", "LightningModule", "Samples", Sequence[str]], dict[str, float]]
"""Function ``(predictor, module, samples, names)`` that returns one number per metric name."""


@dataclass(frozen=True)
class Task:
    """A family of models and data.

    Attributes:
        name: the task's name in data modules.
        metrics: names of all metrics of this task.
        default: names of the metrics computed unless a recipe chooses others.
        score: the metric by which rounds, runs and methods are compared.
        higher_is_better: True if a higher score is better.
        tie_breaker: a metric, lower is better, that decides between rounds of equal score; None: none.
        measure: function that computes the metrics.
    """

    name: str
    metrics: tuple[str, ...]
    default: tuple[str, ...]
    score: str
    higher_is_better: bool
    tie_breaker: str | None
    measure: Measure

    def select(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """Select the metrics to compute; the score is always among them.

        Args:
            names: names from the recipe; None: the default ones.

        Raises:
            UserError: a name is not a metric of this task.
        """
        names = tuple(self.default if names is None else names)
        for i, name in enumerate(names):
            if name not in self.metrics:
                hint = suggest(name, self.metrics)
                raise UserError(f"evaluation.metrics.{i}: {name!r} is no metric of {self.name} data{hint}")
        return names if self.score in names else (self.score, *names)


def _classification(
    predictor: Predictor, module: LightningModule, samples: Samples, names: Sequence[str]
) -> dict[str, float]:
    from fdl.metrics.classification import classification

    return classification(predictor.predict(module, samples), samples.labels, names)


def _language(
    predictor: Predictor, module: LightningModule, samples: Samples, names: Sequence[str]
) -> dict[str, float]:
    from fdl.metrics.language import language

    return language(predictor, module, samples, names)


def _image_text(
    predictor: Predictor, module: LightningModule, samples: Samples, names: Sequence[str]
) -> dict[str, float]:
    from fdl.metrics.retrieval import image_text

    return image_text(predictor, module, samples, names)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="classification",
            metrics=("accuracy", "nll", "macro_f1", "ece", "top5"),
            default=("accuracy",),
            score="accuracy",
            higher_is_better=True,
            tie_breaker="nll",
            measure=_classification,
        ),
        Task(
            name="language",
            metrics=("nll", "perplexity", "bits_per_byte", "token_accuracy"),
            default=("nll", "perplexity", "bits_per_byte"),
            score="nll",
            higher_is_better=False,
            tie_breaker=None,
            measure=_language,
        ),
        Task(
            name="image_text",
            metrics=(
                "mean_recall",
                *(f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
                "contrastive_loss",
            ),
            default=("mean_recall", "image_to_text_recall_at_1", "text_to_image_recall_at_1"),
            score="mean_recall",
            higher_is_better=True,
            tie_breaker="contrastive_loss",
            measure=_image_text,
        ),
    )
}
"""All tasks by name."""
