"""What a model keeps, and what it loses, while private data come in stage by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from fdl.errors import UserError
from fdl.evaluators.base import Evaluator

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from fdl.participants import Server


class Continual(Evaluator):
    """Test accuracy stage by stage, and what follows from it, for recipes with an `arrival`.

    R[i, j] is the accuracy on the test samples of stage j after the last evaluated round of stage i. Metrics:
    ``accuracy_<j>`` for every stage, and those of `transfer`.

    Args:
        among: which classes an image of a stage may be taken for: ``"all"`` of the data, or only its ``"stage"``'s
            own, which tells what is lost from what is merely taken for something newer.
        every: as in `Evaluator`; what is measured needs the last round of every stage.
        label: as in `Evaluator`.
    """

    name = "continual"
    tasks = ("classification",)

    def __init__(self, among: Literal["all", "stage"] = "all", every: int = 1, label: str | None = None):
        super().__init__(every, label)
        if among not in ("all", "stage"):
            raise UserError(f"among must be all or stage, got {among!r}")
        self.among = among

    def prepare(self, server: Server) -> None:
        """See that the test samples belong to stages."""
        if server.test_stages is None:
            raise UserError(
                f"{self.name}: the test samples belong to no stages: the recipe needs an arrival, and test samples "
                "with the classes or domains that it goes by"
            )

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Measure one row of R; the others are kept in the server's state."""
        logits, labels = server.predict(module, server.test), server.test.labels
        rows, chances = [], []
        for stage in range(server.arrival.stages):
            own = torch.from_numpy(server.test_stages == stage)
            possible = labels[own].unique() if self.among == "stage" else torch.arange(logits.shape[1])
            rows.append(accuracy_among(logits[own], labels[own], possible))
            chances.append(1 / max(len(possible), 1))
        known = server.state.setdefault(f"evaluator/{self.label}", {})
        known[str(server.stage)] = rows
        absent = [float("nan")] * len(rows)
        matrix = np.array([known.get(str(stage), absent) for stage in range(server.stage + 1)])
        named = {f"accuracy_{stage}": value for stage, value in enumerate(rows) if not np.isnan(value)}
        return named | transfer(matrix, np.array(chances))


def accuracy_among(logits: Tensor, labels: Tensor, classes: Tensor) -> float:
    """Share of samples whose class has the highest logit among some classes; NaN where there is no sample.

    Args:
        logits: ``[n, C]``.
        labels: int64 ``[n]``, each one of the classes.
        classes: int64 ``[c]``.
    """
    if len(labels) == 0:
        return float("nan")
    return float((classes[logits[:, classes].argmax(1)] == labels).float().mean())


def transfer(matrix: np.ndarray, chance: np.ndarray) -> dict[str, float]:
    """Sum a matrix of accuracies up.

    Sources: Chaudhry et al., "Riemannian Walk for Incremental Learning" (2018), for forgetting; Lopez-Paz and Ranzato,
    "Gradient Episodic Memory for Continual Learning" (2017), for both transfers, of which the forward one is measured
    here against guessing rather than against an untrained model.

    Args:
        matrix: R, ``[s + 1, S]``: accuracy on stage j after stage i, for the stages 0 … s that have been learnt; NaN
            where nothing was measured.
        chance: ``[S]``, what guessing would get in each stage.

    Returns:
        ``average_accuracy`` over stages 0 … s now; and from the second stage on ``forgetting`` (best before minus
        now, mean over earlier stages: lower is better), ``backward_transfer`` (now minus just learnt, likewise) and
        ``forward_transfer`` (just before learnt minus chance, mean over stages 1 … s).
    """
    last = len(matrix) - 1
    values = {"average_accuracy": matrix[last, : last + 1]}
    if last:
        before = np.arange(last)
        now = matrix[last, :last]
        values["forgetting"] = np.fmax.reduce(matrix[:last, :last], axis=0) - now
        values["backward_transfer"] = now - matrix[before, before]
        values["forward_transfer"] = matrix[before, before + 1] - chance[1 : last + 1]
    known = {name: value[~np.isnan(value)] for name, value in values.items()}
    return {name: float(value.mean()) for name, value in known.items() if len(value)}
