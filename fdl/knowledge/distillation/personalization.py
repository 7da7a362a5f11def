"""Weights that follow the phase of training, and downloads made for one client."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fdl.errors import UserError
from fdl.knowledge.aggregation.last_uploads import ExactLogWeights, LastUploads, Parts
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.confidence.base import LIMIT
from fdl.messages import Prototypes, Responses
from fdl.participants import Server, copy_of
from fdl.recipe.config import Fit
from fdl.registry.component import Component
from fdl.state.weights import load_into
from fdl.utils.arguments import one_of, positive

_STEP = 1e-2
"""Learning rate of the look-ahead: small, since only its direction counts."""


class AdaptiveWeights:
    """A client counts the more, the more its answers would lower the student's validation loss at this point.

    The student's gradient on the server's validation set says where its answers to the proxy set should move. A client
    whose answers lie in that direction gains: its log-weight grows by ``rate`` times the cosine between the two, and
    all are centred and clipped (multiplicative weights). To first order the cosine is by how much a step towards the
    client's answers lowers the validation loss. All start alike; what helps changes as the student learns. Validation
    labels only weigh clients; the student is never trained on them.

    Args:
        rate: growth of a log-weight per round at most, > 0.
        limit: largest log-weight for or against a client, > 0.
    """

    name = "adaptive_client_weights"

    def __init__(self, rate: float = 0.5, limit: float = 2.0):
        self.rate, self.limit = positive("rate", rate), positive("limit", limit)

    def current(self, server: Server) -> dict[int, float]:
        """The log-weights in force, by client; a client that is not there has 0."""
        return {int(client): weight for client, weight in server.state.get("weights", {}).items()}

    def update(self, server: Server, gains: Mapping[int, float]) -> dict[str, float]:
        """Let the gains of a round count from the next one on; returns weights for the log."""
        if gains:
            before = self.current(server)
            moved = before | {client: before.get(client, 0.0) + self.rate * gain for client, gain in gains.items()}
            mean = sum(moved.values()) / len(moved)
            server.state["weights"] = {
                str(client): min(max(weight - mean, -self.limit), self.limit)
                for client, weight in sorted(moved.items())
            }
        return {f"weights/{client}": weight for client, weight in self.current(server).items()}


class ValidationGains:
    """Gain of each client's predictions for the student's validation loss, as a cosine.

    Args:
        server: with the student as it is before it learns from them.
    """

    def __init__(self, server: Server):
        if len(server.validation) == 0:
            raise UserError("adaptive weights need a validation set; set data.args.validation")
        self.server = server
        self.by_client: dict[int, float] = {}
        self._wanted: Tensor | None = None
        self._answers: Tensor | None = None

    def add(self, responses: Responses, client: int) -> None:
        """Measure one client's answers, which have been accepted."""
        if self._wanted is None:
            self._look_ahead()
        rows = slice(None) if responses.rows is None else responses.rows
        values = responses.values.float()
        values = torch.softmax(values, dim=1) if responses.form == "logits" else values
        pull, wanted = values - self._answers[rows], self._wanted[rows]
        weights = torch.ones(len(values))
        if responses.confidence is not None:
            logs = responses.confidence.values()
            weights = (logs - logs.amax()).exp() if len(logs) else logs
        pull = pull * weights.unsqueeze(1)
        self.by_client[client] = float(F.cosine_similarity(pull.flatten(), wanted.flatten(), dim=0))

    def _look_ahead(self) -> None:
        """Predict the proxy set after a small step on validation samples, and undo the step."""
        server, student = self.server, self.server.student
        size = min(len(server.validation), server.runtime.batch_size)
        step = Fit(epochs=None, steps=1, batch_size=size, optimizer=Component("sgd", {"lr": _STEP}))
        before, kept = server.predict(student, server.proxy), copy_of(student)
        server.runtime.fit(student, server.validation, step, server.rng("look ahead"))
        self._wanted = server.predict(student, server.proxy) - before
        self._answers = torch.softmax(before, dim=1)
        load_into(student, kept)


def shifted(responses: Responses, shift: float) -> Responses:
    """Answers that count by a factor exp(shift) more, in every row; those of shift 0 themselves."""
    if shift == 0:
        return responses
    own = responses.confidence
    logs = torch.zeros(len(responses.values)) if own is None else own.values()
    return dataclasses.replace(responses, confidence=ExactLogWeights((logs + shift).clamp(-LIMIT, LIMIT)))


class Similarity:
    """Each client is sent its own mixture of the others' last answers, in which those like itself count more.

    The server must hold the last answers of every client for that. Each client's download is coded by itself, so the
    server's work grows with the square of the number of clients.

    Args:
        by: likeness of two clients' answers, the mean over common proxy samples of ``Σ √(p q)``; or of their
            prototypes, the mean over classes of both of the best cosine.
        temperature: t; a client's log-weight is its likeness, in [0, 1] for answers, over t; large values weigh all
            others alike. > 0.
    """

    name = "similarity_mixture"

    def __init__(self, by: Literal["responses", "prototypes"] = "responses", temperature: float = 0.2):
        self.by, self.temperature = one_of("by", by, LIKENESS), positive("temperature", temperature)

    def check(self, prototypes: bool) -> None:
        """Refuse a comparison of prototypes that are not uploaded.

        Args:
            prototypes: whether clients upload prototypes.

        Raises:
            UserError: they do not, and are compared.
        """
        if self.by == "prototypes" and not prototypes:
            raise UserError("personalization compares prototypes, but prototypes are switched off")

    def mixture(
        self,
        client: int,
        last: LastUploads,
        empty: Callable[[], ResponseMean],
        answers: Callable[[AggregatedResponses], Responses],
    ) -> Responses | None:
        """Mix the other clients' predictions for one client; None if the server holds none of its own or of the others.

        Args:
            client: for whom.
            last: all clients' last answers.
            empty: makes a mean without any answers.
            answers: makes a message of what was averaged.
        """
        others = last.all()
        own = others.pop(client, None)
        if own is None or not others:
            return None
        mean = empty()
        for other, parts in others.items():
            likeness = LIKENESS[self.by](own, parts)
            mean.add(shifted(parts[Responses], likeness / self.temperature), other)
        return answers(mean.result())


def response_likeness(own: Parts, other: Parts) -> float:
    """Mean over the rows that both answered of the Bhattacharyya coefficient, in [0, 1]; 0 without any."""
    (mine, my_rows), (theirs, their_rows) = (_probabilities(parts[Responses]) for parts in (own, other))
    common, i, j = _common(my_rows, their_rows)
    return float((mine[i] * theirs[j]).clamp_min(0).sqrt().sum(1).mean()) if common else 0.0


def prototype_likeness(own: Parts, other: Parts) -> float:
    """Mean over the classes that both have of the best cosine between their prototypes; 0 without any."""
    mine, theirs = own[Prototypes], other[Prototypes]
    scores = []
    for label in mine.labels.unique():
        a, b = mine.values[mine.labels == label], theirs.values[theirs.labels == label]
        if len(b):
            scores.append((F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).max())
    return float(torch.stack(scores).mean()) if scores else 0.0


LIKENESS: dict[str, Callable[[Parts, Parts], float]] = {
    "responses": response_likeness,
    "prototypes": prototype_likeness,
}
"""Measures of the similarity of two clients, by name."""


def _probabilities(responses: Responses) -> tuple[Tensor, Tensor]:
    values = responses.values.float()
    rows = torch.arange(len(values)) if responses.rows is None else responses.rows
    return (torch.softmax(values, dim=1) if responses.form == "logits" else values), rows


def _common(a: Tensor, b: Tensor) -> tuple[int, Tensor, Tensor]:
    """Find the rows that two lists share, and their positions in each."""
    _, i, j = np.intersect1d(a.numpy(), b.numpy(), assume_unique=True, return_indices=True)
    return len(i), torch.from_numpy(i), torch.from_numpy(j)
