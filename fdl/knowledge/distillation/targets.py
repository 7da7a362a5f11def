"""The proxy set with answers in the place of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fdl.datamodules.samples import Samples
from fdl.errors import UserError
from fdl.losses.responses import RESPONSE_LOSSES
from fdl.modules.objectives import Terms, samples_of
from fdl.modules.tracing import traceable
from fdl.modules.types import Batch
from fdl.utils.arguments import positive


class SoftLabelled(Samples):
    """Samples whose second element in a batch is what teachers answered.

    Args:
        samples: the inputs; their labels, if any, are not looked at.
        answers: one row a sample, [n, C].
        rows: which samples were answered, int64 [n]; None when all were, in order.
        more: further tensors with one row a sample, which a batch hands out after the answers.
    """

    def __init__(self, samples: Samples, answers: Tensor, rows: Tensor | None = None, more: Sequence[Tensor] = ()):
        self.samples = samples if rows is None else samples.subset(rows)
        self.answers, self.more = answers, tuple(more)
        for column in (answers, *self.more):
            if len(self.samples) != len(column):
                raise ValueError(f"{len(column)} answers for {len(self.samples)} samples")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def at_once(self) -> bool:
        """True if the samples' batches can be gathered at once."""
        return self.samples.at_once

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs and of the answers."""
        return self.samples.nbytes + sum(column.nbytes for column in (self.answers, *self.more))

    @property
    def labels(self) -> None:
        """Answers are not labels."""
        return None

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Inputs and their answers, [B, …] and [B, C], and what more there is."""
        inputs, _ = self.samples.batch(indices, generator)
        return inputs, self.answers[indices], *(column[indices] for column in self.more)

    def subset(self, indices: Tensor) -> SoftLabelled:
        """The chosen samples with their answers."""
        more = [column[indices] for column in self.more]
        return SoftLabelled(self.samples.subset(indices), self.answers[indices], more=more)

    def unlabelled(self) -> Samples:
        """The inputs alone."""
        return self.samples.unlabelled()

    def content_hash(self) -> str:
        """Hash of the inputs."""
        return self.samples.content_hash()


@traceable
@dataclass(frozen=True)
class ResponseObjective:
    """Loss of a model against soft labels.

    Attributes:
        loss: a name among `RESPONSE_LOSSES`.
        temperature: of the softmax over the learner's logits, > 0.

    Raises:
        UserError: for an unknown loss, or a temperature that is not positive.
    """

    loss: str
    temperature: float
    terms: ClassVar[Terms] = staticmethod(samples_of)

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.loss not in RESPONSE_LOSSES:
            raise UserError(f"loss must be one of {', '.join(RESPONSE_LOSSES)}, got {self.loss!r}")
        positive("temperature", self.temperature)

    def __call__(self, module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """The loss of one batch of inputs and answers."""
        inputs, answers = batch
        return {"loss": RESPONSE_LOSSES[self.loss](module(inputs).logits, answers, self.temperature)}
