"""Noisy release of institutions' predictions: differential privacy of all that one institution contributes.

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
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.messages import Responses
from fdl.participants import Participant
from fdl.privacy.accounting import affords, spend

log = logging.getLogger("fdl")


class PrivateAggregate(Aggregate):
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
        release: Callable[[AggregatedResponses, int], AggregatedResponses | None],
    ):
        self._mean, self._bound, self._release = mean, bound, release

    def add(self, responses: Responses, client: int) -> None:
        """Add one client's predictions; arguments and errors as in `ResponseMean.add`."""
        self._mean.add(self._bound(responses), client)

    def result(self) -> AggregatedResponses | None:
        """Return the released aggregate; None if no client uploaded, or the budget is exhausted."""
        knowledge = self._mean.result()
        return None if knowledge is None else self._release(knowledge, self._mean.clients)


def clip_rows(values: Tensor, norm: float) -> Tensor:
    """Rows [n, d] scaled down to an L2 norm; shorter ones stay as they are, to the bit.

    Example:
        >>> import torch
        >>> clip_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), norm=1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values * (norm / lengths).clamp(max=1.0).where(lengths > norm, 1.0)


def add_noise(values: Tensor, deviation: float, stream: torch.Generator) -> Tensor:
    """The values with Gaussian noise; as they are where there is to be none."""
    if deviation == 0:
        return values
    return values + deviation * torch.randn(values.shape, generator=stream, dtype=values.dtype)


def released_only(before: AggregatedResponses, rows: Tensor, values: Tensor, clients: int) -> AggregatedResponses:
    """Knowledge of nothing but what was released.

    Args:
        before: what was known exactly; only its shape and form are taken over.
        rows: that were released, int64 [m].
        values: released answers to them, float [m, C].
        clients: number of clients that uploaded, which is public; all count as having predicted every row.
    """
    uniform = 1 / before.values.shape[1] if before.form == "probabilities" else 0.0
    whole = torch.full_like(before.values, uniform)
    whole[rows] = values.to(whole.dtype)
    coverage = torch.zeros_like(before.coverage)
    coverage[rows] = clients
    return AggregatedResponses.of(whole, before.form, coverage, coverage.double().log())


def spend_or_refuse(participant: Participant, mechanism: Mapping[str, Any]) -> bool:
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
