"""Prototype distillation: the student's embedding against the clients' class centroids."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fdl.knowledge.distillation.terms import (
    DistillationTerm,
    ParticipantAdapter,
    StudentOutput,
    StudentWidths,
    TermLoss,
)
from fdl.knowledge.transfer.prototypes import PrototypeKnowledge, PrototypeTransfer


class PrototypeColumns(NamedTuple):
    """Rows of the assignment of samples to prototypes.

    Attributes:
        assignment: [B, m], share to which each sample belongs to each of m prototypes; rows sum to 1.
    """

    assignment: Tensor


class PrototypeTerm(DistillationTerm):
    """γ · distance between the student's embeddings and the prototypes of their classes.

    Args:
        transfer: settings, γ among them.
        knowledge: prototypes of the round.
        probabilities: soft labels of the samples that the student learns, [n, C].
        public: the same samples in the public space, [n, d], where prototypes lie in it; None where they do not.
    """

    name = "prototype"

    def __init__(
        self, transfer: PrototypeTransfer, knowledge: PrototypeKnowledge, probabilities: Tensor, public: Tensor | None
    ):
        super().__init__(transfer.weight)
        self._columns = PrototypeColumns(knowledge.assignment(probabilities, public))
        self.function, self.by_class = transfer.function, transfer.by == "class"
        self.adapted = knowledge.participants is not None
        self.constant("centres", knowledge.values)
        self.constant("labels", knowledge.labels)
        if self.adapted:
            self.constant("participants", knowledge.participants)

    def columns(self) -> PrototypeColumns:
        """The assignment to prototypes, one row per sample."""
        return self._columns

    def head(self, widths: StudentWidths) -> nn.Linear | None:
        """A projector to the public space, where the prototypes lie in it.

        Args:
            widths: sizes of the student's outputs.
        """
        return None if self.adapted else nn.Linear(widths.embedding, self.centres.shape[1])

    def loss(
        self,
        student: StudentOutput,
        columns: PrototypeColumns,
        head: nn.Module | None,
        adapter: ParticipantAdapter | None,
    ) -> TermLoss:
        """Compute the prototype loss of one batch.

        Args:
            student: outputs of the student for the batch.
            columns: the assignment of the batch to prototypes.
            head: the projector to the public space; None without.
            adapter: maps prototypes of single clients to the student's space; needed where there is no head.
        """
        if head is not None:
            return TermLoss(self.function(head(student.output.embedding), self.centres, columns.assignment))
        centres, probe = adapter(self.centres.unsqueeze(0), self.participants).squeeze(0), None
        if self.by_class:
            probe = nn.functional.nll_loss(adapter.class_log_probabilities(centres), self.labels)
        return TermLoss(self.function(student.activations, centres.detach(), columns.assignment), probe)
