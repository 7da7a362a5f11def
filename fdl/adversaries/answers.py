"""Attacks on answers to the proxy set: a class is named for every sample, with all probability on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fdl.adversaries.base import Adversary, AttackContext, answer, honest_values
from fdl.errors import UserError
from fdl.messages import Responses
from fdl.participants import Client


class OneHotAttack(Adversary, ABC):
    """Base of those that answer with one class for certain; a subclass writes `classes`."""

    spaces = ("responses",)
    tasks = ("classification",)

    @abstractmethod
    def classes(self, own: Responses, scene: AttackContext) -> Tensor:
        """The class to name for every row, int64 [n]."""

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """All probability on one class a row."""
        return answer(own, F.one_hot(self.classes(own, scene), own.values.shape[1]).double())


class FixedClass(OneHotAttack):
    """Name the same class for every sample.

    Args:
        target: its number.
        confidence: as in `Adversary`.
    """

    name = "fixed_class"

    def __init__(self, target: int = 0, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.target = target

    def prepare(self, client: Client) -> None:
        """Refuse a class that there is not."""
        in_range("target", self.target, client.num_classes)

    def classes(self, own: Responses, scene: AttackContext) -> Tensor:
        """The target, n times."""
        return torch.full((len(own.values),), self.target)


class RandomClass(OneHotAttack):
    """Name a random class for every sample, drawn anew in each round."""

    name = "random_class"

    def classes(self, own: Responses, scene: AttackContext) -> Tensor:
        """Uniform over the classes, from the client's own stream."""
        return torch.randint(own.values.shape[1], (len(own.values),), generator=scene.client.rng("adversary"))


class LeastLikely(OneHotAttack):
    """LMA: name the class that the honest clients, on average, hold for the least likely.

    Source: Roux, Zimmer and Pokutta, "On the Byzantine-Resilience of Distillation-Based Federated Learning" (2024).
    """

    name = "least_likely"
    sees = "all"

    def classes(self, own: Responses, scene: AttackContext) -> Tensor:
        """``argmin_c`` of the honest mean."""
        return honest_probabilities(own, scene).mean(0).argmin(1)


class ClassConfusion(OneHotAttack):
    """CPA: name the class that is least like the one that the honest clients name.

    How alike classes are is their covariance over the proxy set; Roux et al. (2024) take it from a pretrained model, an
    adversary that sees the honest answers takes it from their mean. The same class is always mistaken for the same
    other one, so all adversaries, and all samples of a class, push the student in one direction.
    """

    name = "class_confusion"
    sees = "all"

    def classes(self, own: Responses, scene: AttackContext) -> Tensor:
        """``argmin_c Cov[ĉ, c]`` with ĉ the class that the honest mean names."""
        mean = honest_probabilities(own, scene).mean(0)
        return class_covariance(mean).argmin(1)[mean.argmax(1)]


class HiddenReplay(Adversary):
    """HIPS: repeat, sample by sample, the honest answer that does the most harm.

    Of a single sample it cannot be told from an honest client. The harm is the cross entropy of the honest mean under
    what the mean becomes: ``-Σ_c m_c log((1 - β) m_c + β p_ic)`` is largest for the answer i that is repeated, where β
    is the adversaries' share of the answers.

    Source: Roux, Zimmer and Pokutta (2024), with the loss of their LMA.
    """

    name = "worst_replay"
    spaces = ("responses",)
    tasks = ("classification",)
    sees = "all"

    def responses(self, own: Responses, scene: AttackContext) -> Responses:
        """One of the honest answers a row."""
        honest = honest_probabilities(own, scene)
        mean, share = honest.mean(0), scene.hostile / scene.heard
        harm = -(mean * ((1 - share) * mean + share * honest).clamp_min(1e-30).log()).sum(2)
        return answer(own, honest[harm.argmax(0), torch.arange(honest.shape[1])])


def honest_probabilities(own: Responses, scene: AttackContext) -> Tensor:
    """Honest answers to the same rows as probabilities, float64 [k, n, C]."""
    values = honest_values(own, scene)
    return torch.softmax(values, dim=2) if own.form == "logits" else values


def class_covariance(probabilities: Tensor) -> Tensor:
    """Covariance of the classes' probabilities over samples, [C, C] from [n, C]."""
    centred = probabilities - probabilities.mean(0)
    return centred.T @ centred / max(len(probabilities), 1)


def in_range(name: str, value: int, classes: int) -> None:
    """Refuse a class that the data do not have."""
    if not 0 <= value < classes:
        raise UserError(f"{name}: there is no class {value}: they are 0 … {classes - 1}")
