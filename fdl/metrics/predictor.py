"""Interface through which metrics run a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from fdl.datamodules.samples import Samples


class Predictor(Protocol):
    """The part of a participant that metrics use.

    Attributes:
        model_kwargs: keyword arguments that the data supply to model constructors, e.g. the tokenizer.
    """

    model_kwargs: Mapping[str, Any]

    def predict(self, module: LightningModule, samples: Samples, what: Any = "logits") -> Tensor:
        """Run a model on samples without gradients.

        Args:
            module: the model.
            samples: the n samples.
            what: the output to return: the name of a field of `Output`, or a function of module and inputs.

        Returns:
            Predictions, float32 [n, …], on the CPU.
        """
        ...
