"""Attacks on predictions for the proxy set: one class per sample gets all the probability."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fdl.adversaries.base import Adversary, AttackContext, honest_values, with_probabilities
from fdl.errors import UserError
from fdl.messages import Responses
from fdl.participants import Client


class OneHotAttack(Adversary, ABC):
    """Base of attacks that predict one class with certainty; a subclass implements `classes`."""

    spaces = ("responses",)
    tasks = ("classification",)

    @abstractmethod
    def classes(self, own: Responses, context: AttackContext) -> Tensor:
        """Return the class to predict for every row.

        Args:
            own: the client's honest predictions, n rows.
            context: what the adversary knows in this round.

        Returns:
            int64 [n].
        """

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Put all probability on one class per row."""
        return with_probabilities(own, F.one_hot(self.classes(own, context), own.values.shape[1]).double())


class FixedClass(OneHotAttack):
    """Predict the same class for every sample.

    Args:
        target: index of the class, in [0, number of classes).
        confidence: the log-weight to send, ``"largest"`` or ``"own"``; see `Adversary`.
    """

    name = "fixed_class"

    def __init__(self, target: int = 0, confidence: Literal["largest", "own"] = "largest"):
        super().__init__(confidence)
        self.target = target

    def prepare(self, client: Client) -> None:
        """Reject a target class that the client's data do not have."""
        check_class("target", self.target, client.num_classes)

    def classes(self, own: Responses, context: AttackContext) -> Tensor:
        """Return the target for every row."""
        return torch.full((len(own.values),), self.target)


class RandomClass(OneHotAttack):
    """Predict a random class for every sample, drawn afresh in each round."""

    name = "random_class"

    def classes(self, own: Responses, context: AttackContext) -> Tensor:
        """Draw classes uniformly from the client's own random stream."""
        return torch.randint(own.values.shape[1], (len(own.values),), generator=context.client.rng("adversary"))


class LeastLikely(OneHotAttack):
    """LMA: predict the class that is least likely under the honest clients' mean prediction.

    Source: Roux, Zimmer and Pokutta, "On the Byzantine-Resilience of Distillation-Based Federated Learning" (2024).
    """

    name = "least_likely"
    sees = "all"

    def classes(self, own: Responses, context: AttackContext) -> Tensor:
        """Return ``argmin_c`` of the honest mean."""
        return honest_probabilities(own, context).mean(0).argmin(1)


class ClassConfusion(OneHotAttack):
    """CPA: predict the class that is least similar to the one that the honest clients predict.

    The similarity of two classes is their covariance over the proxy set; Roux et al. (2024) take it from a pretrained
    model, an adversary that sees the honest predictions takes it from their mean. The same class is always mistaken for
    the same other one, so all adversaries, and all samples of a class, push the student in one direction.
    """

    name = "class_confusion"
    sees = "all"

    def classes(self, own: Responses, context: AttackContext) -> Tensor:
        """Return ``argmin_c Cov[ĉ, c]`` with ĉ the class that the honest mean predicts."""
        mean = honest_probabilities(own, context).mean(0)
        return class_covariance(mean).argmin(1)[mean.argmax(1)]


class HiddenReplay(Adversary):
    """HIPS: repeat, sample by sample, the honest prediction that does the most harm.

    On a single sample it cannot be distinguished from an honest client. The harm is the cross entropy of the honest
    mean under the resulting mean: ``-Σ_c m_c log((1 - β) m_c + β p_ic)`` is largest for the prediction i that is
    repeated, where β is the adversaries' share of the uploads.

    Source: Roux, Zimmer and Pokutta (2024), with the loss of their LMA.
    """

    name = "worst_replay"
    spaces = ("responses",)
    tasks = ("classification",)
    sees = "all"

    def responses(self, own: Responses, context: AttackContext) -> Responses:
        """Select one of the honest predictions per row."""
        honest = honest_probabilities(own, context)
        mean, share = honest.mean(0), context.num_attackers / context.num_uploads
        harm = -(mean * ((1 - share) * mean + share * honest).clamp_min(1e-30).log()).sum(2)
        return with_probabilities(own, honest[harm.argmax(0), torch.arange(honest.shape[1])])


def honest_probabilities(own: Responses, context: AttackContext) -> Tensor:
    """Return the honest predictions for the same rows as probabilities.

    Args:
        own: the client's honest predictions, which give the rows and the form.
        context: gives the uploads of the honest clients.

    Returns:
        float64 [k, n, C], k honest clients.
    """
    values = honest_values(own, context)
    return torch.softmax(values, dim=2) if own.form == "logits" else values


def class_covariance(probabilities: Tensor) -> Tensor:
    """Return the covariance of the classes' probabilities over samples, [C, C] from [n, C]."""
    centred = probabilities - probabilities.mean(0)
    return centred.T @ centred / max(len(probabilities), 1)


def check_class(name: str, value: int, classes: int) -> None:
    """Check that the data have a class.

    Args:
        name: of the argument, for the error message.
        value: index of the class.
        classes: number of classes of the data.

    Raises:
        UserError: they do not.
    """
    if not 0 <= value < classes:
        raise UserError(f"{name}: there is no class {value}: they are 0 … {classes - 1}")
