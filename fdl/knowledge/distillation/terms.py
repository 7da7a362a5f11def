"""Terms of the student's loss in one round: the interface, and the response term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fdl.knowledge.transfer.extraction import EMBEDDING, pool
from fdl.losses.responses import RESPONSE_LOSSES
from fdl.modules.adapter import ADAPTERS
from fdl.modules.output import Output

Columns = TypeVar("Columns", bound=NamedTuple)


@dataclass(frozen=True, eq=False)
class StudentOutput:
    """Outputs of the student for a batch of B samples, from one forward pass.

    Attributes:
        output: logits, embedding, and the activations that were captured.
        layers: names of the layers that are compared with participants' features.
        targets: soft labels of the batch, [B, C], in the form that the response loss compares.
    """

    output: Output
    layers: Sequence[str]
    targets: Tensor

    @property
    def activations(self) -> Tensor:
        """The compared layers side by side, each pooled to one vector per sample: [B, d]."""
        own = [self.output.embedding if name == EMBEDDING else pool(self.output.features[name]) for name in self.layers]
        return torch.cat(own, dim=1)


class StudentWidths(NamedTuple):
    """Sizes that heads are built for.

    Attributes:
        embedding: width of the student's embedding.
        activations: width of `StudentOutput.activations`.
    """

    embedding: int
    activations: int


class TermLoss(NamedTuple):
    """Contribution of a term to one training step.

    Attributes:
        value: the term, unweighted, a scalar.
        adapter: the loss that keeps the adapter's space meaningful, weight 1; None where the adapter is not used.
    """

    value: Tensor
    adapter: Tensor | None = None


class ParticipantAdapter(nn.Module):
    """Maps participants' features to the student's space, and probes the classes in it.

    One linear probe must tell the classes from any participant's mapped features. Without it, adapter and student
    could meet at a constant.

    Args:
        kind: a name among `fdl.modules.adapter.ADAPTERS`.
        participants: number of clients.
        inputs: width of participants' features.
        outputs: width of the student's space.
        num_classes: C.
    """

    def __init__(self, kind: str, participants: int, inputs: int, outputs: int, num_classes: int):
        super().__init__()
        self.adapter = ADAPTERS[kind](participants, inputs, outputs)
        self.probe = nn.Linear(outputs, num_classes)

    def forward(self, features: Tensor, participants: Tensor) -> Tensor:
        """Map features [B, P, inputs] of the clients int64 [P] to [B, P, outputs]."""
        return self.adapter(features, participants)

    def class_log_probabilities(self, mapped: Tensor) -> Tensor:
        """Log-probabilities of the classes, [..., C], by the probe from mapped features [..., outputs]."""
        return torch.log_softmax(self.probe(mapped), dim=-1)


class DistillationTerm(nn.Module, ABC):
    """One weighted term of the student's loss, built from the uploads of a round.

    A module without parameters of its own: tensors that all samples share are its buffers, which are not saved. The
    term's head, and the adapter that terms share, are trained with the student.

    Attributes:
        name: of the term in logs, and of its head in the server's state.
        weight: factor of the term in the loss, ≥ 0.
        adapted: whether the term maps participants' features by the shared adapter.
    """

    name: ClassVar[str]
    adapted: bool = False

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def constant(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that all samples share as the attribute `name`.

        Args:
            name: name of the attribute.
            tensor: its value.
        """
        self.register_buffer(name, tensor, persistent=False)

    @abstractmethod
    def columns(self) -> Any:
        """Tensors with one row per sample that come with a batch: a named tuple, whose unused fields are None."""

    def head(self, widths: StudentWidths) -> nn.Module | None:
        """The projector that the term trains with the student; None without.

        Args:
            widths: sizes of the student's outputs.
        """
        return None

    @abstractmethod
    def loss(
        self, student: StudentOutput, columns: Any, head: nn.Module | None, adapter: ParticipantAdapter | None
    ) -> TermLoss:
        """Compute the term for one batch.

        Args:
            student: outputs of the student for the batch.
            columns: the rows of `columns` for the samples of the batch.
            head: the module returned by `head`, on the device; None without.
            adapter: the adapter shared by all terms; None where none of them is `adapted`.
        """


class NoColumns(NamedTuple):
    """Columns of a term that needs nothing but the targets."""


class ResponseTerm(DistillationTerm):
    """Response distillation: the student's logits against the soft labels of the proxy set.

    Args:
        loss: a name among `fdl.losses.responses.RESPONSE_LOSSES`.
        temperature: temperature of the softmax over the student's logits, > 0.
        weight: the weight α, ≥ 0.
    """

    name = "response"

    def __init__(self, loss: str, temperature: float, weight: float):
        super().__init__(weight)
        self.function, self.temperature = RESPONSE_LOSSES[loss], temperature

    def columns(self) -> NoColumns:
        """No columns: the targets come with every batch."""
        return NoColumns()

    def loss(
        self, student: StudentOutput, columns: NoColumns, head: nn.Module | None, adapter: ParticipantAdapter | None
    ) -> TermLoss:
        """Compute the response loss of one batch.

        Args:
            student: outputs of the student for the batch, with its targets.
            columns: no columns.
            head: not used.
            adapter: not used.
        """
        return TermLoss(self.function(student.output.logits, student.targets, self.temperature))


def used_columns(columns: NamedTuple) -> tuple[Tensor, ...]:
    """The tensors of a term's columns, without unused fields, in order.

    Args:
        columns: a named tuple whose unused fields are None.
    """
    return tuple(column for column in columns if column is not None)


def columns_of_batch(used: tuple[type[Columns], tuple[bool, ...]], tensors: Iterator[Tensor]) -> Columns:
    """A term's columns for one batch.

    Args:
        used: type of the columns, and for each of its fields whether it is used.
        tensors: iterator over the used fields, for the samples of the batch; they are consumed.
    """
    kind, fields = used
    return kind(*(next(tensors) if field else None for field in fields))
