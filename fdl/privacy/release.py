"""What institutions say of the proxy set, with noise: differential privacy of all that one of them contributes.

One private example can move every answer of a model that was not trained with noise, so noise on answers is calibrated
to the whole contribution of an institution: neighbours are two federations that differ in all data of one of them,
which is replaced by any other. That covers a change of one example, too. Who is heard in a round is not hidden.

Who adds the noise is who has to be trusted with the exact answers:

- a client, before it sends: nobody. The server, too, sees only noise (local differential privacy);
- the server, once, to what it makes of all answers: the server. Only the other clients, and whoever gets the student,
  see noise, of which it takes as many times less as there are clients. The clients' own accounts say nothing of it, for
  towards the server nothing is private; the server's account does.

Noise is drawn from streams of the recipe's seed: who knows the seed can subtract it, so where it is to protect anybody
each institution keeps a seed of its own to itself. It is floating-point noise, whose lowest bits are not hardened
(Mironov, 2012).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.aggregation import Knowledge, ResponseMean
from fdl.knowledge.option import Option
from fdl.messages import Responses
from fdl.participants import Client, Participant, Server
from fdl.privacy.accounting import affords, spend

log = logging.getLogger("fdl")


class Release(Option, ABC):
    """How answers to the proxy set are made private.

    Attributes:
        by: who adds the noise.
        space: what the clients have to send.
    """

    by: Literal["client", "server"]
    space: Literal["logits", "probabilities"]

    def check(self, space: str, weighted: bool, beside: Mapping[str, object]) -> None:
        """Refuse settings by which more would go out than this covers.

        Args:
            space: what the clients send.
            weighted: whether confidences go with the answers.
            beside: options by name, None where one is off.

        Raises:
            UserError: naming the option.
        """
        name = type(self).name
        if space != self.space:
            raise UserError(f"release: {name} is for {self.space}, and space is {space}")
        if weighted and self.by == "server":
            raise UserError(f"release: {name} counts all clients alike, so confidence must be left out")
        # what is sent, or left unsaid, without noise; and what is made of single clients' answers before the noise
        bare = ("features", "prototypes", "frequency", *(("weights", "personal") if self.by == "server" else ()))
        for option in bare:
            if beside.get(option) is not None:
                raise UserError(f"release: {name} adds noise to answers, and {option} would go out without any")

    @abstractmethod
    def message(self, client: Client, said: Responses, log_weights: Tensor | None) -> Responses | None:
        """What a client sends; None where its budget is spent.

        Args:
            client: who answers.
            said: its exact answers, as many a row as there are classes.
            log_weights: how sure it is of each, [n]; None where no confidence is asked for.
        """

    def collect(self, mean: ResponseMean, server: Server, rows: Tensor | None) -> ResponseMean | Protected:
        """What takes in the clients' answers in a round.

        Args:
            mean: that averages them.
            server: who asks.
            rows: of the proxy set that are asked for, int64 [n], None for all.
        """
        return mean


class Protected:
    """A mean over clients that bounds what goes in and lets nothing out but what was released.

    Args:
        mean: holds the exact sums.
        bound: makes a client's answers such that the noise covers them, or refuses them.
        release: makes of the mean over clients, and of how many were heard, what may be known; None for nothing.
    """

    def __init__(
        self,
        mean: ResponseMean,
        bound: Callable[[Responses], Responses],
        release: Callable[[Knowledge, int], Knowledge | None],
    ):
        self._mean, self._bound, self._release = mean, bound, release

    def add(self, responses: Responses, client: int) -> None:
        """Take in one client's answers; arguments and errors as in `ResponseMean.add`."""
        self._mean.add(self._bound(responses), client)

    def result(self) -> Knowledge | None:
        """What is released; None when nobody was heard, or nothing is left of the budget."""
        knowledge = self._mean.result()
        return None if knowledge is None else self._release(knowledge, self._mean.clients)


def clipped(values: Tensor, norm: float) -> Tensor:
    """Rows [n, d] scaled down to an L2 norm; shorter ones stay as they are, to the bit."""
    lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values * (norm / lengths).clamp(max=1.0).where(lengths > norm, 1.0)


def noisy(values: Tensor, deviation: float, stream: torch.Generator) -> Tensor:
    """The values with Gaussian noise; as they are where there is to be none."""
    if deviation == 0:
        return values
    return values + deviation * torch.randn(values.shape, generator=stream, dtype=values.dtype)


def released(before: Knowledge, rows: Tensor, values: Tensor, clients: int) -> Knowledge:
    """Knowledge of nothing but what was released.

    Args:
        before: what was known exactly; only its shape and form are taken over.
        rows: that were released, int64 [m].
        values: released answers to them, float [m, C].
        clients: how many were heard, which is public; all count as having answered.
    """
    uniform = 1 / before.values.shape[1] if before.form == "probabilities" else 0.0
    whole = torch.full_like(before.values, uniform)
    whole[rows] = values.to(whole.dtype)
    coverage = torch.zeros_like(before.coverage)
    coverage[rows] = clients
    return Knowledge.of(whole, before.form, coverage, coverage.double().log())


def paid(participant: Participant, mechanism: Mapping[str, Any]) -> bool:
    """Note a mechanism in an account, unless the budget has no room for it; then it must not run.

    Args:
        participant: who runs it.
        mechanism: an event.
    """
    if affords(participant, mechanism):
        spend(participant, mechanism)
        return True
    participant.metrics["privacy/exhausted"] = 1.0
    who = "the server" if participant.id < 0 else f"client {participant.id}"
    log.info("%s: its privacy budget has no room for %s, which is left out", who, mechanism["mechanism"])
    return False
