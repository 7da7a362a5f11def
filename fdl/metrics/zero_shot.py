"""Zero-shot accuracy of dual encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.participants import Participant
from fdl.modules.zero_shot import zero_shot_question


def zero_shot_accuracy(
    participant: Participant, module: LightningModule, samples: Samples, labels: Tensor, classifier: Tensor
) -> float:
    """Share of images whose class has the highest logit.

    Args:
        participant: whose runtime answers.
        module: a dual encoder.
        samples: n images, or pairs.
        labels: int64 ``[n]``.
        classifier: ``[C, D]``, as from `zero_shot_classifier`.
    """
    logits = participant.predict(module, samples, zero_shot_question(classifier))
    return float((logits.argmax(1) == labels).float().mean())
