"""Continual learning: forgetting and transfer while private data arrive in stages."""

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
    """Test accuracy per stage, forgetting and transfer, for recipes with an `arrival` schedule.

    R[i, j] is the accuracy on the test samples of stage j after the last evaluated round of stage i. Metrics:
    ``accuracy_<j>`` per stage, and those of `transfer`.

    Args:
        among: the classes that a prediction may choose from: ``"all"`` classes of the data, or those of the sample's
            own ``"stage"``, which separates forgetting from confusion with newer classes.
        every: number of rounds between two evaluations; 0: only after the last round. The metrics need the last round
            of every stage.
        label: name under which the metrics are recorded; None: ``"continual"``.
    """

    name = "continual"
    tasks = ("classification",)

    def __init__(self, among: Literal["all", "stage"] = "all", every: int = 1, label: str | None = None):
        super().__init__(every, label)
        if among not in ("all", "stage"):
            raise UserError(f"among must be all or stage, got {among!r}")
        self.among = among

    def prepare(self, server: Server) -> None:
        """Check that the test samples are assigned to stages."""
        if server.test_stages is None:
            raise UserError(
                f"{self.name}: the test samples belong to no stages: the recipe needs an arrival, and test samples "
                "with the classes or domains that it goes by"
            )

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Measure one row of R; earlier rows are kept in the server's state."""
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
    """Compute the accuracy of predictions restricted to some classes; NaN for no samples.

    Args:
        logits: ``[n, C]``.
        labels: int64 ``[n]``, all among `classes`.
        classes: numbers of the classes to choose from, int64 ``[c]``.
    """
    if len(labels) == 0:
        return float("nan")
    return float((classes[logits[:, classes].argmax(1)] == labels).float().mean())


def transfer(matrix: np.ndarray, chance: np.ndarray) -> dict[str, float]:
    """Summarise a matrix of accuracies by stage.

    Sources: Chaudhry et al., "Riemannian Walk for Incremental Learning" (2018), for forgetting; Lopez-Paz and Ranzato,
    "Gradient Episodic Memory for Continual Learning" (2017), for both transfers, except that forward transfer is
    relative to chance instead of to an untrained model.

    Args:
        matrix: R, ``[s + 1, S]``: accuracy on stage j after stage i, for the stages 0 … s learnt so far; NaN if not
            measured.
        chance: ``[S]``, chance level of each stage.

    Returns:
        ``average_accuracy``: mean current accuracy of stages 0 … s. From the second stage on also ``forgetting``: best
        earlier minus current accuracy, mean over earlier stages (lower is better); ``backward_transfer``: current
        accuracy minus that right after the stage was learnt, mean over earlier stages; ``forward_transfer``: accuracy
        right before the stage was learnt minus chance, mean over stages 1 … s.
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
