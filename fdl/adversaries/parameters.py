"""Attacks that need no classes: on weights as on answers.

On weights they move along or against the clients' displacement from what the server sent. On answers they work with
logits; probabilities go through their logarithm and come back through softmax, so that they stay probabilities.
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
    answer_logits,
    honest_values,
    honest_vectors,
    logits_of,
    start_of,
    vector_of,
    with_vector,
)
from fdl.messages import Parameters, Responses
from fdl.utils.arguments import positive


class SignFlip(Adversary):
    """Say the opposite: ``w_0 - scale · (w - w_0)`` of weights that began at w_0, ``-scale · z`` of logits.

    Args:
        scale: how far it goes, > 0.
        confidence: as in `Adversary`.
    """

    name = "sign_flip"

    def __init__(self, scale: float = 1.0, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.scale = positive("scale", scale)

    def parameters(self, own: Parameters, scene: AttackContext) -> Parameters:
        """Its own displacement, turned round."""
        start = start_of(own, scene)
        return with_vector(own, start - self.scale * (vector_of(own) - start))

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """Its own logits, turned round."""
        return answer_logits(own, -self.scale * logits_of(own))


class GaussianNoise(Adversary):
    """Add normal noise to what it would honestly send.

    Args:
        std: of the noise, in units of weights or logits, > 0.
        confidence: as in `Adversary`.
    """

    name = "gaussian_noise"

    def __init__(self, std: float = 1.0, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.std = positive("std", std)

    def parameters(self, own: Parameters, scene: AttackContext) -> Parameters:
        """Its weights, each with noise of its own."""
        vector = vector_of(own)
        return with_vector(own, vector + self.std * normal(vector.shape, scene))

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """Its logits, each with noise of its own."""
        return answer_logits(own, logits_of(own) + self.std * normal(own.values.shape, scene))


class ALittleIsEnough(Adversary):
    """ALIE: shift every number by as many standard deviations as most honest clients lie apart anyway.

    ``mean - z · std`` over the honest uploads, coordinate by coordinate, with z so that enough of them lie further out
    for the adversaries to hold a majority with these: ``Φ(z) = (n - f - s) / (n - f)``, ``s = ⌊n/2 + 1⌋ - f``, of n
    uploads f hostile. Probabilities that it makes negative become 0, and the rows are normalised again.

    Source: Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning" (2019).

    Args:
        z: how many standard deviations; None as said above.
        confidence: as in `Adversary`.
    """

    name = "alie"
    sees = "all"

    def __init__(self, z: float | None = None, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.z = z

    def parameters(self, own: Parameters, scene: AttackContext) -> Parameters:
        """The honest mean, shifted."""
        return with_vector(own, self._shifted(honest_vectors(own, scene), scene))

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """The honest mean, shifted, on the simplex where answers are probabilities."""
        values = self._shifted(honest_values(own, scene), scene)
        if own.form == "probabilities":
            values = values.clamp_min(EPS)
            values = values / values.sum(1, keepdim=True)
        return replace(own, values=values.to(own.values.dtype))

    def _shifted(self, honest: Tensor, scene: AttackContext) -> Tensor:
        z = largest_z(scene.heard, scene.hostile) if self.z is None else self.z
        return honest.mean(0) - z * honest.std(0, correction=0)


class InnerProduct(Adversary):
    """IPM: send the honest mean with a negative factor, so that the product of what is learnt and what is true falls.

    ``w_0 - ε · mean(w - w_0)`` of weights, ``-ε · mean(z)`` of logits. With a small ε it is not further from the honest
    uploads than these from each other; with ε > (n - f) / f a plain mean turns round.

    Source: Xie, Koyejo and Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation"
    (2019).

    Args:
        epsilon: ε > 0.
        confidence: as in `Adversary`.
    """

    name = "inner_product"
    sees = "all"

    def __init__(self, epsilon: float = 0.5, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.epsilon = positive("epsilon", epsilon)

    def parameters(self, own: Parameters, scene: AttackContext) -> Parameters:
        """The honest clients' mean displacement, turned round."""
        start = start_of(own, scene)
        return with_vector(own, start - self.epsilon * (honest_vectors(own, scene).mean(0) - start))

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """The honest clients' mean logits, turned round."""
        values = honest_values(own, scene)
        logits = values.clamp_min(EPS).log() if own.form == "probabilities" else values
        return answer_logits(own, -self.epsilon * logits.mean(0))


def largest_z(heard: int, hostile: int) -> float:
    """The shift of ALIE in standard deviations.

    Args:
        heard: n, uploads of the round.
        hostile: f, how many of them are adversaries'.

    Returns:
        A finite number, also where the adversaries are a majority, or where none of the others is needed.
    """
    honest = max(heard - hostile, 1)
    supporters = heard // 2 + 1 - hostile
    share = (honest - supporters) / honest
    least = 0.5 / honest
    return NormalDist().inv_cdf(min(max(share, least), 1 - least))


def normal(shape: torch.Size, scene: AttackContext) -> Tensor:
    """Standard normal numbers of the client's own stream for its attacks in this round, float64."""
    return torch.randn(shape, dtype=torch.float64, generator=scene.client.rng("adversary"))
