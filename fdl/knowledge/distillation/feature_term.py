"""Feature distillation: the student's activations against those of the clients."""

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
from fdl.knowledge.transfer.features import FeatureKnowledge, FeatureTransfer
from fdl.losses.features import FEATURE_LOSSES


class FeatureColumns(NamedTuple):
    """Rows of the clients' features.

    Attributes:
        features: [B, width], the weighted sum over clients; or [B, P, width] of each of P clients, for the adapter.
        known: bool [B], rows that have features; None where all have.
        shares: [B, P], each client's weight for a row; None for a sum.
        probabilities: [B, C], soft labels, from which the adapter's probe learns; None for a sum.
    """

    features: Tensor
    known: Tensor | None
    shares: Tensor | None
    probabilities: Tensor | None


class FeatureTerm(DistillationTerm):
    """β · distance between the student's activations and the clients' features.

    Args:
        transfer: settings, β among them.
        knowledge: features of the round.
        probabilities: soft labels of the samples that the student learns, [n, C].
        rows: of the proxy set that the student learns, int64 [n]; None for all.
    """

    name = "feature"

    def __init__(
        self, transfer: FeatureTransfer, knowledge: FeatureKnowledge, probabilities: Tensor, rows: Tensor | None
    ):
        super().__init__(transfer.weight)
        chosen = slice(None) if rows is None else rows
        known = knowledge.known[chosen]
        shares = None if knowledge.shares is None else knowledge.shares[chosen]
        self.function, self.adapted = FEATURE_LOSSES[transfer.loss], shares is not None
        partly, targets = None if bool(known.all()) else known, probabilities if self.adapted else None
        self._columns = FeatureColumns(knowledge.values[chosen], partly, shares, targets)
        if self.adapted:
            self.constant("participants", knowledge.participants)

    def columns(self) -> FeatureColumns:
        """The clients' features, one row per sample."""
        return self._columns

    def head(self, widths: StudentWidths) -> nn.Linear | None:
        """A projector to the clients' space, for losses that compare point by point.

        Args:
            widths: sizes of the student's outputs.
        """
        if self.adapted or not self.function.projected:
            return None
        return nn.Linear(widths.activations, self._columns.features.shape[-1])

    def loss(
        self,
        student: StudentOutput,
        columns: FeatureColumns,
        head: nn.Module | None,
        adapter: ParticipantAdapter | None,
    ) -> TermLoss:
        """Compute the feature loss of one batch.

        Args:
            student: outputs of the student for the batch.
            columns: the clients' features of the batch.
            head: the projector to the clients' space; None without.
            adapter: maps features of single clients to the student's space; None for a sum over clients.
        """
        features, own, probe = columns.features, student.activations, None
        if adapter is not None and columns.shares is not None:
            mapped, shares = adapter(features, self.participants), columns.shares
            losses = -(columns.probabilities.unsqueeze(1) * adapter.class_log_probabilities(mapped)).sum(2)
            probe = (shares * losses).sum() / shares.sum().clamp_min(1e-12)
            # detached: the student must move towards the clients; if both moved, they could collapse to a constant
            features = (mapped * shares.unsqueeze(2)).sum(1).detach()
        if head is not None:
            own = head(own)
        if columns.known is not None:  # samples predicted in earlier rounds only have no features
            own, features = own[columns.known], features[columns.known]
            if len(own) < 2:
                return TermLoss(own.sum() * 0.0, probe)
        return TermLoss(self.function(own, features), probe)
