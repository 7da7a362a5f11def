"""Confidence of a language model's predictions, per token of a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fdl.knowledge.confidence.base import LIMIT, ClientView
from fdl.utils.arguments import not_negative, one_of, positive


class Certainty(NamedTuple):
    """Statistics of a language model's predictions of token t + 1 at every position t of n windows.

    Attributes:
        log_likelihood: log p(x_t | x_<t), float32 [n, T]; 0 for the first token and for padding.
        entropy: of its answer, in nats, float32 [n, T].
        largest: logarithm of the answer's largest probability, float32 [n, T].
    """

    log_likelihood: Tensor
    entropy: Tensor
    largest: Tensor


class TokenConfidence(ABC):
    """A client's log-weight at each position; weights are the softmax over clients of the log-weights.

    It is found by the client alone, from tokens up to t for the answer to token t + 1: a weight that looked at the
    answer would tell it. In the mixture only differences between clients matter.
    """

    def log_weights(self, client: ClientView, certainty: Certainty) -> Tensor:
        """Weigh one client's predictions.

        Args:
            client: the client; its private data stay with it.
            certainty: statistics of its model's predictions.

        Returns:
            float32 [n, T], at most LIMIT; without a least value, since what has become unlikely stays so.
        """
        return self.score(client, certainty).float().clamp_max(LIMIT)

    @abstractmethod
    def score(self, client: ClientView, certainty: Certainty) -> Tensor:
        """Compute the log-weights before clipping, [n, T].

        Args:
            client: the client; its private data stay with it.
            certainty: statistics of its model's predictions.
        """


class BayesianMixture(TokenConfidence):
    """Weights by how well each specialist foretold the text so far: the posterior over whose text this is.

    The log-weight at t is ``a · Σ_{s≤t} log p_k(x_s | x_<s)`` within the window, plus the logarithm of the prior. With
    a = 1 the mixture is Bayes' posterior predictive, if each window comes from one client's model; a below 1 allows
    for models that are wrong in the same places and for windows that are of several kinds. a = 0 leaves the prior.

    Source: the posterior over domains by which DEMix weighs its experts (Gururangan et al. 2022); the power is ours.

    Args:
        power: a, ≥ 0.
        prior: all clients alike before the first token, or by how many windows they trained on.
    """

    name = "bayesian_mixture"

    def __init__(self, power: float = 0.3, prior: Literal["uniform", "samples"] = "uniform"):
        self.power = not_negative("power", power)
        self.prior = one_of("prior", prior, ("uniform", "samples"))

    def score(self, client: ClientView, certainty: Certainty) -> Tensor:
        """``a · Σ log p + log prior``."""
        prior = torch.tensor(float(client.samples if self.prior == "samples" else 1)).log()
        return self.power * certainty.log_likelihood.double().cumsum(1) + prior


class TokenEntropy(TokenConfidence):
    """Weight by the certainty of a prediction, measured by its entropy.

    Args:
        temperature: t in ``-H(p) / t``, in nats; small values leave only the most certain client. > 0.
    """

    name = "token_entropy"

    def __init__(self, temperature: float = 0.25):
        self.temperature = positive("temperature", temperature)

    def score(self, client: ClientView, certainty: Certainty) -> Tensor:
        """``-H(p) / t``."""
        return -certainty.entropy / self.temperature


class TokenMaxProbability(TokenConfidence):
    """Weight by the probability of the most likely token.

    Args:
        power: a in ``max_v p_v^a``; > 0.
    """

    name = "token_max_probability"

    def __init__(self, power: float = 1.0):
        self.power = positive("power", power)

    def score(self, client: ClientView, certainty: Certainty) -> Tensor:
        """``a · log max_v p_v``."""
        return self.power * certainty.largest
