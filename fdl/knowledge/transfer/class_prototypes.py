"""One common prototype per class: its mean over clients, and classification by the nearest one."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.messages import Prototypes
from fdl.modules.output import Output

UNKNOWN = 30.0
"""Logits by which a class without a prototype lies below the farthest class with one."""


class NearestPrototype(nn.Module):
    """Classifier by the squared distances d² of an embedding to the classes' prototypes: the logits are -d².

    Args:
        module: the model that gives embeddings.
        centres: prototypes [C, d].
        known: which classes have one, bool [C]; the others come last, e⁻³⁰ times as likely as the farthest of these.
    """

    def __init__(self, module: LightningModule, centres: Tensor, known: Tensor):
        super().__init__()
        self.module, self.centres, self.known = module, centres, known

    def forward(self, inputs: Any) -> Output:
        """Logits [B, C] and embeddings of a batch."""
        output = self.module(inputs)
        embedding = output.embedding.float()
        apart = (embedding.unsqueeze(1) - self.centres.to(embedding)).square().sum(2)
        known = self.known.to(embedding.device)
        farthest = apart[:, known].amax(1, keepdim=True)
        return Output(torch.where(known, -apart, -farthest - UNKNOWN), output.embedding, {})


class ClassPrototypeMeans(Aggregate):
    """Streaming means of the clients' prototypes, one per class.

    Args:
        num_classes: C.
        width: of an embedding, None: that of the first upload.
        by_samples: whether a prototype counts by its samples.
    """

    def __init__(self, num_classes: int, width: int | None, by_samples: bool):
        self.num_classes, self.width, self.by_samples = num_classes, width, by_samples
        self.sums: Tensor | None = None
        self.counts = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, message: Prototypes, client: int) -> None:
        """Add one client's prototypes.

        Args:
            message: at most one prototype per class, with sample counts.
            client: its id.

        Raises:
            RejectedMessageError: they do not fit; the means are as they were.
        """
        if not isinstance(message, Prototypes):
            raise RejectedMessageError(f"expected prototypes, got {message.kind}")
        message.validate()
        labels, width = message.labels, self.width or message.values.shape[1]
        if message.values.shape[1] != width:
            raise RejectedMessageError(f"expected prototypes [m, {width}], got {list(message.values.shape)}")
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise RejectedMessageError(f"a prototype's class lies outside of 0 … {self.num_classes - 1}")
        if len(labels.unique()) < len(labels):
            raise RejectedMessageError("several prototypes of one class")
        weights = message.counts if self.by_samples else torch.ones_like(message.counts)
        if self.sums is None:
            self.width, self.sums = width, torch.zeros(self.num_classes, width, dtype=torch.float64)
        self.sums.index_add_(0, labels, message.values.double() * weights.unsqueeze(1))
        self.counts.index_add_(0, labels, weights)

    def result(self) -> dict[str, Tensor] | None:
        """``values`` float32 [C, width] and ``counts`` int64 [C]; None where no client has sent any."""
        if self.sums is None:
            return None
        return {"values": (self.sums / self.counts.clamp_min(1).unsqueeze(1)).float(), "counts": self.counts}
