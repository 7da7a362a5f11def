"""Zero-shot accuracy of dual encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fdl.modules.zero_shot import zero_shot_selector

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.metrics.predictor import Predictor


def zero_shot_accuracy(
    predictor: Predictor, module: LightningModule, samples: Samples, labels: Tensor, classifier: Tensor
) -> float:
    """Compute the zero-shot accuracy of a dual encoder.

    Args:
        predictor: the participant that runs the model.
        module: the dual encoder.
        samples: n images, or image–text pairs.
        labels: true classes, int64 ``[n]``.
        classifier: class weights ``[C, D]`` from `zero_shot_classifier`.
    """
    logits = predictor.predict(module, samples, zero_shot_selector(classifier))
    return float((logits.argmax(1) == labels).float().mean())
