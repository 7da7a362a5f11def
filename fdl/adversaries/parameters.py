"""Attacks that need no classes, on weights and on predictions.

On weights they move along or against the clients' displacement from the server's download. On predictions they work
with logits; probabilities pass through their logarithm and return through softmax, so that they stay probabilities.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from fdl.adversaries.base import (
    EPS,
    Adversary,
    AttackContext,
    honest_values,
    honest_vectors,
    initial_vector,
    logits_of,
    vector_of,
    with_logits,
    with_vector,
)
from fdl.messages import Parameters, Responses
from fdl.utils.arguments import positive


class SignFlip(Adversary):
    """Flip the update's sign: ``w_0 - scale · (w - w_0)`` of weights that started at w_0, ``-scale · z`` of logits.

    Args:
        scale: factor of the flipped update, > 0.
        confidence: the log-weight to send, ``"largest"`` or ``"own"``; see `Adversary`.
    """

    name = "sign_flip"

    def __init__(self, scale: float = 1.0, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.scale = positive("scale", scale)

    def parameters(self, own: Parameters, context: AttackContext) -> Parameters:
        """Return the weights with the client's own displacement negated."""
        start = initial_vector(own, context)
        return with_vector(own, start - self.scale * (vector_of(own) - start))

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Return the client's own logits, negated."""
        return with_logits(own, -self.scale * logits_of(own))


class GaussianNoise(Adversary):
    """Add Gaussian noise to the honest upload.

    Args:
        std: standard deviation of the noise, in units of weights or logits, > 0.
        confidence: the log-weight to send, ``"largest"`` or ``"own"``; see `Adversary`.
    """

    name = "gaussian_noise"

    def __init__(self, std: float = 1.0, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.std = positive("std", std)

    def parameters(self, own: Parameters, context: AttackContext) -> Parameters:
        """Return the client's weights with independent noise."""
        vector = vector_of(own)
        return with_vector(own, vector + self.std * normal(vector.shape, context))

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Return the client's logits with independent noise."""
        return with_logits(own, logits_of(own) + self.std * normal(own.values.shape, context))


class ALittleIsEnough(Adversary):
    """ALIE: shift every number by as many standard deviations as honest clients differ anyway.

    ``mean - z · std`` over the honest uploads, coordinate by coordinate, with z so that enough of them lie further out
    for the adversaries to hold a majority with these: ``Φ(z) = (n - f - s) / (n - f)``, ``s = ⌊n/2 + 1⌋ - f``, of n
    uploads f hostile. Probabilities that it makes negative become 0, and the rows are normalised again.

    Source: Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning" (2019).

    Args:
        z: number of standard deviations; None for the value above.
        confidence: the log-weight to send, ``"largest"`` or ``"own"``; see `Adversary`.
    """

    name = "alie"
    sees = "all"

    def __init__(self, z: float | None = None, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.z = z

    def parameters(self, own: Parameters, context: AttackContext) -> Parameters:
        """Return the honest mean, shifted."""
        return with_vector(own, self._shifted(honest_vectors(own, context), context))

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Return the honest mean, shifted, on the simplex if predictions are probabilities."""
        values = self._shifted(honest_values(own, context), context)
        if own.form == "probabilities":
            values = values.clamp_min(EPS)
            values = values / values.sum(1, keepdim=True)
        return replace(own, values=values.to(own.values.dtype))

    def _shifted(self, honest: Tensor, context: AttackContext) -> Tensor:
        z = largest_z(context.num_uploads, context.num_attackers) if self.z is None else self.z
        return honest.mean(0) - z * honest.std(0, correction=0)


class InnerProduct(Adversary):
    """IPM: send the honest mean with a negative factor, to make the inner product of true and aggregated update fall.

    ``w_0 - ε · mean(w - w_0)`` of weights, ``-ε · mean(z)`` of logits. With a small ε it is not further from the honest
    uploads than these from each other; with ε > (n - f) / f a plain mean changes its sign.

    Source: Xie, Koyejo and Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation"
    (2019).

    Args:
        epsilon: ε > 0.
        confidence: the log-weight to send, ``"largest"`` or ``"own"``; see `Adversary`.
    """

    name = "inner_product"
    sees = "all"

    def __init__(self, epsilon: float = 0.5, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.epsilon = positive("epsilon", epsilon)

    def parameters(self, own: Parameters, context: AttackContext) -> Parameters:
        """Return the weights displaced by the negated mean displacement of honest clients."""
        start = initial_vector(own, context)
        return with_vector(own, start - self.epsilon * (honest_vectors(own, context).mean(0) - start))

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Return the negated mean logits of honest clients."""
        values = honest_values(own, context)
        logits = values.clamp_min(EPS).log() if own.form == "probabilities" else values
        return with_logits(own, -self.epsilon * logits.mean(0))


def largest_z(num_uploads: int, num_attackers: int) -> float:
    """Return the shift of ALIE in standard deviations.

    Args:
        num_uploads: n, number of uploads of the round.
        num_attackers: f, number of adversaries' uploads among them.

    Returns:
        A finite number, even if the adversaries are a majority, or need no honest client.
    """
    honest = max(num_uploads - num_attackers, 1)
    supporters = num_uploads // 2 + 1 - num_attackers
    share = (honest - supporters) / honest
    least = 0.5 / honest
    return NormalDist().inv_cdf(min(max(share, least), 1 - least))


def normal(shape: torch.Size, context: AttackContext) -> Tensor:
    """Draw standard normal numbers from the client's own stream for its attacks in this round, float64.

    Args:
        shape: of the tensor to draw.
        context: gives the client.
    """
    return torch.randn(shape, dtype=torch.float64, generator=context.client.rng("adversary"))
