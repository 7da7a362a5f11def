"""Interface of whoever computes a model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from fdl.datamodules.samples import Samples


class Predictor(Protocol):
    """What a metric needs of a participant.

    Attributes:
        model_kwargs: what the data tell a model's constructor, e.g. their tokenizer.
    """

    model_kwargs: Mapping[str, Any]

    def predict(self, module: LightningModule, samples: Samples, what: Any = "logits") -> Tensor:
        """Predict samples without gradients.

        Args:
            module: the model.
            samples: what to predict, n of them.
            what: which output, by name or as a function of a batch.

        Returns:
            Predictions, float32 [n, …], on the CPU.
        """
        ...
