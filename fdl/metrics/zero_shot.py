"""Zero-shot accuracy of dual encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.metrics.predictor import Predictor
from fdl.modules.zero_shot import zero_shot_question


def zero_shot_accuracy(
    predictor: Predictor, module: LightningModule, samples: Samples, labels: Tensor, classifier: Tensor
) -> float:
    """Share of images whose class has the highest logit.

    Args:
        predictor: whose runtime answers.
        module: a dual encoder.
        samples: n images, or pairs.
        labels: int64 ``[n]``.
        classifier: ``[C, D]``, as from `zero_shot_classifier`.
    """
    logits = predictor.predict(module, samples, zero_shot_question(classifier))
    return float((logits.argmax(1) == labels).float().mean())
