"""Classification metrics.

Predictions are counted per class: for n predictions of C classes, no tensor is larger than ``[n, C]`` or ``[C, C]``.
(The multi-class metrics of torchmetrics, in deterministic mode, compare every prediction with every cell of the
confusion matrix, which takes 9 n C² bytes: 90 GB for 10,000 predictions of 1,000 classes.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from fdl.errors import UserError
from fdl.utils.suggest import suggest

_ROWS = 1024
"""Number of rows whose probabilities are in memory at a time."""


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


def _top5(logits: Tensor, labels: Tensor) -> Tensor:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).float().mean()


def _macro_f1(logits: Tensor, labels: Tensor) -> Tensor:
    classes, predicted = logits.shape[1], logits.argmax(1)
    right = labels[predicted == labels].bincount(minlength=classes)
    occurrences = labels.bincount(minlength=classes) + predicted.bincount(minlength=classes)
    occurs = occurrences > 0
    return (2 * right[occurs].double() / occurrences[occurs]).mean()


def _ece(logits: Tensor, labels: Tensor) -> Tensor:
    # softmax is taken here, because torchmetrics treats logits that happen to lie in [0, 1] as probabilities
    confidence = torch.cat([part.softmax(1).amax(1) for part in logits.split(_ROWS)])
    right = (logits.argmax(1) == labels).long()
    return binary_calibration_error(confidence, right, n_bins=15, validate_args=False)


CLASSIFICATION_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": _accuracy,
    "nll": F.cross_entropy,
    "macro_f1": _macro_f1,
    "ece": _ece,
    "top5": _top5,
}
"""Metrics of logits ``[n, C]`` and labels ``[n]`` by name.

``accuracy`` and ``top5`` are fractions of rows; ``nll`` is in nats; ``macro_f1`` averages over the classes that occur
among the labels or the predictions; ``ece`` is the expected calibration error with 15 bins of equal width.
"""


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count predictions by true and predicted class.

    Args:
        predicted: predicted classes, int64 [n].
        labels: true classes, int64 [n].
        classes: number of classes.

    Returns:
        int64 [classes, classes]; rows are true classes, columns predicted ones.

    Example:
        >>> import torch
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), classes=2)
        tensor([[1, 1],
                [0, 1]])
    """
    return (labels * classes + predicted).bincount(minlength=classes**2).reshape(classes, classes)


def classification(logits: Tensor, labels: Tensor, names: Sequence[str] = ("accuracy",)) -> dict[str, float]:
    """Compute classification metrics of logits.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]`` int64, on the same device.
        names: the metrics to compute, keys of `CLASSIFICATION_METRICS`.

    Returns:
        One number per name, in the given order; ``nan`` if n is 0.

    Raises:
        UserError: a name is unknown.

    Example:
        >>> import torch
        >>> classification(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]), ["accuracy"])
        {'accuracy': 0.5}
    """
    for name in names:
        if name not in CLASSIFICATION_METRICS:
            raise UserError(f"unknown metric {name!r}{suggest(name, CLASSIFICATION_METRICS)}")
    if not len(labels):
        return dict.fromkeys(names, math.nan)
    logits = logits.float()
    return {name: CLASSIFICATION_METRICS[name](logits, labels).item() for name in names}
