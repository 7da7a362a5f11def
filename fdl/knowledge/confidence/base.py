"""Confidence: the log-weight of a client's prediction, one number per proxy sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fdl.datamodules.samples import Samples
from fdl.encoders.base import PCA, Encoder
from fdl.errors import UserError
from fdl.utils.arguments import positive

LIMIT = 32.0
"""Log-weights lie in [-LIMIT, LIMIT]: in 8 bits a step is then at most 1/4, and no client can weigh more than that."""


class ClientView(Protocol):
    """View of one client for a confidence: its private data, and nothing of other clients."""

    train: Samples
    calibration: Samples
    proxy: Samples
    encoder: Encoder | None
    num_classes: int
    cache: dict[str, Any]

    @property
    def samples(self) -> int:
        """Number of private training samples."""
        ...

    def calibration_accuracy(self) -> float:
        """Accuracy of its specialist on its held-out private samples; chance where it has none."""
        ...


class Confidence(ABC):
    """A client's log-weight for each proxy row; weights are the softmax over clients of the log-weights.

    Only this number leaves the site, in 8 bits. A number that is added to all clients' log-weights of a row changes
    nothing.

    Attributes:
        needs_encoder: whether it is measured in the space of the recipe's public encoder.
        needs_calibration: whether it looks at private samples that are held out from training.
        reads_samples: whether it is measured on private samples, and so says of them what answers do not.
    """

    needs_encoder: bool = False
    needs_calibration: bool = False
    reads_samples: bool = False

    def log_weights(self, client: ClientView, logits: Tensor) -> Tensor:
        """Weigh one client's predictions.

        Args:
            client: the client; its private data stay with it.
            logits: its predictions of the proxy set, [n_proxy, C].

        Returns:
            float32 [n_proxy], clipped to [-LIMIT, LIMIT]; NaN only where the prediction itself is not finite.
        """
        return self.score(client, logits.detach().float().cpu()).float().clamp(-LIMIT, LIMIT)

    @abstractmethod
    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """Compute the log-weights before clipping, [n_proxy].

        Args:
            client: the client; its private data stay with it.
            logits: its predictions of the proxy set, float32 [n_proxy, C], on the CPU.
        """


def public_space(client: ClientView) -> Encoder:
    """The encoder that all sites share: the recipe's, or else PCA fitted on the proxy set."""
    if client.encoder is not None:
        return client.encoder
    if "encoder" not in client.cache:
        key = client.proxy.content_hash()
        encoder = _FITTED.get(key)
        if encoder is None:
            encoder = _FITTED[key] = PCA()
            encoder.fit(client.proxy)
        client.cache["encoder"] = encoder
    return client.cache["encoder"]


_FITTED: WeakValueDictionary[str, PCA] = WeakValueDictionary()
"""Encoders by the proxy set they were fitted on: sites that are simulated in one process fit one, not one each."""


class Uniform(Confidence):
    """Equal weights for all clients."""

    name = "uniform"

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """Zero for every row."""
        return torch.zeros(len(logits))


class SampleCount(Confidence):
    """Weight by the client's number of private samples, as in FedAvg."""

    name = "sample_count"

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """``log n_k`` for every row."""
        return torch.full((len(logits),), float(client.samples)).log()


class Validation(Confidence):
    """Weight by the specialist's accuracy on the client's held-out samples; no weight below chance."""

    name = "validation"
    needs_calibration = True

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """``log accuracy`` for every row; the floor for an accuracy below 1/C."""
        accuracy = client.calibration_accuracy()
        guessing = accuracy < 1 / client.num_classes
        return torch.full((len(logits),), 0.0 if guessing else accuracy).log()


class Entropy(Confidence):
    """Weight by the certainty of a prediction, measured by its entropy.

    Args:
        temperature: t in ``-H(p) / t``, in nats; small values leave only the most certain client. > 0.
    """

    name = "entropy"

    def __init__(self, temperature: float = 0.25):
        self.temperature = positive("temperature", temperature)

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """``-H(softmax(z)) / t``."""
        log_p = torch.log_softmax(logits, dim=1)
        return torch.special.entr(log_p.exp()).sum(1).neg() / self.temperature


class MaxProbability(Confidence):
    """Weight by the probability of the most likely class.

    Args:
        power: a in ``max_c p_c^a``; > 0.
    """

    name = "max_probability"

    def __init__(self, power: float = 1.0):
        self.power = positive("power", power)

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """``a · log max_c p_c``."""
        return self.power * torch.log_softmax(logits, dim=1).amax(1)


class Margin(Confidence):
    """Weight by the margin between the most likely class and the second.

    Args:
        temperature: t in ``(p_first - p_second) / t``; > 0.
    """

    name = "margin"

    def __init__(self, temperature: float = 0.25):
        self.temperature = positive("temperature", temperature)

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """``(p_first - p_second) / t``."""
        first, second = torch.softmax(logits, dim=1).topk(2, dim=1).values.unbind(1)
        return (first - second) / self.temperature


class Product(Confidence):
    """Several confidences at once: their weights are multiplied, so an answer counts where all of them agree.

    Args:
        factors: at least one.
    """

    name = "product"

    def __init__(self, factors: list[Confidence]):
        if not factors:
            raise UserError("factors must name at least one confidence")
        self.factors = list(factors)
        self.needs_encoder = any(factor.needs_encoder for factor in self.factors)
        self.needs_calibration = any(factor.needs_calibration for factor in self.factors)
        self.reads_samples = any(factor.reads_samples for factor in self.factors)

    def score(self, client: ClientView, logits: Tensor) -> Tensor:
        """The sum of the factors' log-weights."""
        return torch.stack([factor.log_weights(client, logits) for factor in self.factors]).sum(0)
