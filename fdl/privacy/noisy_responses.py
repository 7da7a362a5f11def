"""Noisy predictions: logits with Gaussian noise, added by each client or by the server."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.release import Release
from fdl.messages import QuantizedLogWeights, Responses
from fdl.participants import Client, Server
from fdl.privacy.accounting import event
from fdl.privacy.release import PrivateAggregate, add_noise, clip_rows, released_only, spend_or_refuse
from fdl.utils.arguments import not_negative, one_of, positive


class NoisyResponses(Release):
    """The Gaussian mechanism on answers whose rows are clipped: logits of L2 norm at most S, n rows in a message.

    - By the client: noise of standard deviation z · 2S√n on every logit. Where confidences go with the answers, a row
      is the pair of logits / S and log-weight / B, whose norm is at most √2, and the noise is that of this pair,
      z · 2√(2n) in units of S and B.
    - By the server: z · 2S√n / K on the mean over the K clients heard. A row that a client leaves out counts as zeros.
      (Were neighbours those where a client says nothing but zeros, half of it would do.)

    With many rows that is much noise: a smaller `proxy_fraction`, or `noisy_votes`, needs less.

    Args:
        noise_multiplier: z, noise over sensitivity; at 0 answers are only clipped, and nothing is private.
        clip: S, > 0.
        bound: B; log-weights are cut off at ±B, > 0.
        by: who adds the noise.
    """

    name = "noisy_responses"
    space = "logits"

    def __init__(
        self,
        noise_multiplier: float,
        clip: float = 1.0,
        bound: float = 1.0,
        by: Literal["client", "server"] = "client",
    ):
        self.noise_multiplier = not_negative("noise_multiplier", noise_multiplier)
        self.clip, self.bound = positive("clip", clip), positive("bound", bound)
        self.by = one_of("by", by, ("client", "server"))
        self._event = event(self.name, self.noise_multiplier, level="institution")

    def message(self, client: Client, said: Responses, log_weights: Tensor | None) -> Responses | None:
        """Return the clipped predictions, with noise if the client adds it."""
        # an answer that is not finite would be refused, which everybody sees
        values = clip_rows(said.values.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0), self.clip)
        sure = None if log_weights is None else log_weights.float().cpu().nan_to_num(0.0).clamp(-self.bound, self.bound)
        if self.by == "client":
            if not spend_or_refuse(client, self._event):
                return None
            parts = 1 if sure is None else 2
            deviation = self.noise_multiplier * response_sensitivity(len(values), parts)
            stream = client.noise("release")
            values = add_noise(values, self.clip * deviation, stream)
            if sure is not None:
                sure = add_noise(sure, self.bound * deviation, stream).clamp(-self.bound, self.bound)
        confidence = None if sure is None else QuantizedLogWeights.quantize(sure)
        return Responses(values, "logits", said.rows, confidence)

    def collect(self, mean: ResponseMean, server: Server, rows: Tensor | None) -> ResponseMean | PrivateAggregate:
        """The mean itself where clients add the noise; else a noisy one."""
        if self.by == "client":
            return mean

        def bound(responses: Responses) -> Responses:
            if responses.form != "logits":
                raise RejectedMessageError(f"expected logits, got {responses.form}")
            return replace(responses, values=clip_rows(responses.values.detach().to("cpu", torch.float64), self.clip))

        def release(knowledge: AggregatedResponses, clients: int) -> AggregatedResponses | None:
            if not spend_or_refuse(server, self._event):
                return None
            asked = torch.arange(len(knowledge.values)) if rows is None else rows
            # the sum over clients divided by the number of all that uploaded, whether or not they predict the row
            means = (knowledge.values * (knowledge.coverage / clients).unsqueeze(1))[asked]
            deviation = self.noise_multiplier * self.clip * response_sensitivity(len(asked)) / clients
            return released_only(knowledge, asked, add_noise(means, deviation, server.noise("release")), clients)

        return PrivateAggregate(mean, bound, release)


def response_sensitivity(rows: int, parts: int = 1) -> float:
    """Return the L2 sensitivity of a message: ``2 √(rows · parts)``, for parts of norm at most 1 in each row."""
    return 2 * math.sqrt(rows * parts)
