"""Composite aggregate: predictions, features and prototypes of every client, checked together, averaged separately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.last_uploads import LastUploads
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.distillation.personalization import ValidationGains, shifted
from fdl.knowledge.transfer.features import FeatureKnowledge, FeatureMean
from fdl.knowledge.transfer.prototypes import PrototypeKnowledge, PrototypePool
from fdl.messages import Bundle, Features, Message, Prototypes, Responses, UploadStatus, parts_of


@dataclass(frozen=True, eq=False)
class RoundKnowledge:
    """Aggregated knowledge of a round's clients.

    Attributes:
        responses: mean of their predictions.
        features: mean of their features; None if features are switched off.
        prototypes: their class prototypes; None if prototypes are switched off or none were uploaded.
        gains: cosine gain of each client's predictions for the student, by client; empty if switched off.
    """

    responses: AggregatedResponses
    features: FeatureKnowledge | None = None
    prototypes: PrototypeKnowledge | None = None
    gains: Mapping[int, float] = field(default_factory=dict)


class CompositeAggregate(Aggregate):
    """Streaming aggregate of uploads with several parts; an upload of which one part does not fit is rejected whole.

    Args:
        responses: mean of the predictions.
        features: mean of the features; None if none are expected.
        prototypes: pool of the prototypes; None if none are expected.
        shifts: number added to all log-weights of a client, by client; None for no shifts.
        gains: measures how much predictions help the student; None if not needed.
        last: the clients' last uploads; None if not needed.
        rows: rows of the proxy set that clients predict in this round, int64 [m]; None for all.
        reuse: whether a client may upload a status instead, by which its last predictions stay valid.
    """

    def __init__(
        self,
        responses: ResponseMean,
        features: FeatureMean | None = None,
        prototypes: PrototypePool | None = None,
        shifts: Mapping[int, float] | None = None,
        gains: ValidationGains | None = None,
        last: LastUploads | None = None,
        rows: Tensor | None = None,
        reuse: bool = False,
    ):
        self.responses, self.features, self.prototypes = responses, features, prototypes
        self.shifts, self.gains, self.last, self.rows, self.reuse = shifts or {}, gains, last, rows, reuse
        wanted = {Responses: responses, Features: features, Prototypes: prototypes}
        self._expected = {kind for kind, taker in wanted.items() if taker is not None}

    def add(self, message: Message | Bundle, client: int) -> None:
        """Add one client's upload.

        Args:
            message: its predictions, bundled with features and prototypes where they are expected; or its status.
            client: id of the sender.

        Raises:
            RejectedMessageError: the upload does not fit; the aggregate is unchanged.
        """
        parts = parts_of(message)
        fresh = not (self.reuse and parts.keys() == {UploadStatus})
        parts = parts if fresh else self.last.recall(client, parts[UploadStatus].round, self.rows)
        if parts.keys() != self._expected:
            raise RejectedMessageError(f"expected {_kinds(self._expected)}, got {_kinds(parts)}")
        if self.features is not None:
            if parts[Features].confidence is not None and self.responses.weighted is False:
                raise RejectedMessageError("features with a confidence that was not asked for")
            self.features.check(parts[Features])
        if self.prototypes is not None:
            self.prototypes.check(parts[Prototypes])
        weighted = shifted(parts[Responses], self.shifts.get(client, 0.0))
        self.responses.add(weighted, client)  # the last check that may reject, before anything is changed
        if self.features is not None:
            self.features.add(parts[Features], _log_weights(weighted, self.features.n_rows), client)
        if self.prototypes is not None:
            self.prototypes.add(parts[Prototypes], client)
        if self.gains is not None:
            self.gains.add(parts[Responses], client)
        if fresh and self.last is not None:
            self.last.keep(client, parts)

    def result(self) -> RoundKnowledge | None:
        """The knowledge of the round; None if no upload was accepted."""
        responses = self.responses.result()
        if responses is None:
            return None
        return RoundKnowledge(
            responses,
            None if self.features is None else self.features.result(),
            None if self.prototypes is None else self.prototypes.result(),
            {} if self.gains is None else dict(self.gains.by_client),
        )


def _log_weights(responses: Responses, n_rows: int) -> Tensor:
    """Log-weights of all rows, float64 [n_rows]; 0 for rows without a prediction."""
    weights = torch.zeros(n_rows, dtype=torch.float64)
    if responses.confidence is not None:
        weights[slice(None) if responses.rows is None else responses.rows] = responses.confidence.values().double()
    return weights


def _kinds(kinds: object) -> str:
    return " and ".join(sorted(kind.kind for kind in kinds)) or "nothing"
