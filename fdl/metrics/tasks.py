"""What models of each family are asked, and which of the answers' metrics says how good they are.

No torch here: a recipe's metrics are checked before anything is loaded.
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
"""Measures a predictor's module on samples: (predictor, module, samples, names) to a number a name."""


@dataclass(frozen=True)
class Task:
    """One family of models and data.

    Attributes:
        name: as data modules name it.
        metrics: all that can be measured on samples of this task.
        default: those that are, where a recipe does not choose.
        score: the metric by which rounds, runs and methods are compared.
        higher_is_better: whether more of the score is better.
        tie_breaker: a metric of which less is better, that decides between rounds of equal score.
        measure: measures a module.
    """

    name: str
    metrics: tuple[str, ...]
    default: tuple[str, ...]
    score: str
    higher_is_better: bool
    tie_breaker: str | None
    measure: Measure

    def asked(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """The metrics that a recipe asks for; the score is always among them.

        Raises:
            UserError: one is not of this task.
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
"""Every task by its name."""
