"""What comes in during a round: answers, features and prototypes of every client, checked together, summed apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.last_uploads import LastAnswers
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.distillation.personalization import ValidationGains, shifted
from fdl.knowledge.transfer.features import FeatureKnowledge, FeatureMean
from fdl.knowledge.transfer.prototypes import PrototypeKnowledge, PrototypePool
from fdl.messages import Bundle, Features, Message, Prototypes, Responses, UploadStatus, parts_of


@dataclass(frozen=True, eq=False)
class RoundKnowledge:
    """What the clients of a round know.

    Attributes:
        responses: their answers.
        features: what they see, None where that is switched off.
        prototypes: where their classes lie, None where that is switched off or there are none.
        gains: by client, how much its answers would help the student; empty where that is switched off.
    """

    responses: AggregatedResponses
    features: FeatureKnowledge | None = None
    prototypes: PrototypeKnowledge | None = None
    gains: Mapping[int, float] = field(default_factory=dict)


class CompositeAggregate(Aggregate):
    """Takes uploads in as they arrive; an upload that does not fit is refused whole.

    Args:
        responses: mean of the answers.
        features: mean of the features, None when none are expected.
        prototypes: pool of the prototypes, None when none are expected.
        shifts: what is added to all log-weights of a client.
        gains: measures how much answers help, None where nobody asks.
        last: the clients' last answers, None where nobody needs them.
        rows: of the proxy set that are asked for in this round, None for all.
        reuse: whether a client may say that its last answers still hold.
    """

    def __init__(
        self,
        responses: ResponseMean,
        features: FeatureMean | None = None,
        prototypes: PrototypePool | None = None,
        shifts: Mapping[int, float] | None = None,
        gains: ValidationGains | None = None,
        last: LastAnswers | None = None,
        rows: Tensor | None = None,
        reuse: bool = False,
    ):
        self.responses, self.features, self.prototypes = responses, features, prototypes
        self.shifts, self.gains, self.last, self.rows, self.reuse = shifts or {}, gains, last, rows, reuse
        wanted = {Responses: responses, Features: features, Prototypes: prototypes}
        self._expected = {kind for kind, taker in wanted.items() if taker is not None}

    def add(self, message: Message | Bundle, client: int) -> None:
        """Take in one client's upload.

        Raises:
            RefusedError: it does not fit; all is as it was.
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
        self.responses.add(weighted, client)  # the last one that may refuse, and it does so before it changes anything
        if self.features is not None:
            self.features.add(parts[Features], _log_weights(weighted, self.features.n_rows), client)
        if self.prototypes is not None:
            self.prototypes.add(parts[Prototypes], client)
        if self.gains is not None:
            self.gains.add(parts[Responses], client)
        if fresh and self.last is not None:
            self.last.keep(client, parts)

    def result(self) -> RoundKnowledge | None:
        """What was collected; None when nobody was heard."""
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
    """Log-weights of all rows, float64 [n_rows]; 0 for rows that were not answered."""
    weights = torch.zeros(n_rows, dtype=torch.float64)
    if responses.confidence is not None:
        weights[slice(None) if responses.rows is None else responses.rows] = responses.confidence.values().double()
    return weights


def _kinds(kinds: object) -> str:
    return " and ".join(sorted(kind.kind for kind in kinds)) or "nothing"
