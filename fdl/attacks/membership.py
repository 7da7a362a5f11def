"""Membership inference: was a sample among those that a client trained on?"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

import numpy as np

from fdl.attacks import scores
from fdl.attacks.base import Attack, AttackResult, MembershipScores
from fdl.attacks.candidates import candidates
from fdl.attacks.shadows import observe, shadows
from fdl.attacks.signals import TARGETS
from fdl.errors import UserError
from fdl.privacy.accounting import Policy, epsilon, events_of
from fdl.utils.arguments import at_least, one_of, positive

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.participants import Client

Target = Literal["student", "specialists", "responses"]

_TRAINING = "dp_sgd"
"""The mechanism that protects a specialist itself; all others protect only what leaves the client."""

_POLICY = Policy(1e-5)
"""Where a recipe says nothing of privacy, and so gives no δ."""


class MembershipInference(Attack):
    """Base of the attacks that score candidates; settings only.

    The student is asked about all candidates, each client's specialist about that client's. Of a client's answers to
    the proxy set, which its server sees (beside confidences, for which there is `confidence_inference`), those to the
    proxy samples nearest to a candidate stand for the model's answer to the candidate itself; shadows are looked at in
    the same way (after Distillation-LiRA, arXiv 2502.08001, which distils a model from the answers and asks that).

    Args:
        targets: what is attacked; by default all that the run has.
        neighbours: proxy samples that stand for a candidate, at least 1.
        label: as in `Attack`.
    """

    def __init__(
        self,
        targets: list[Target] | None = None,
        neighbours: int = 3,
        label: str | None = None,
    ):
        super().__init__(label)
        self.targets = tuple(TARGETS if targets is None else (one_of("targets", name, TARGETS) for name in targets))
        self.neighbours = at_least("neighbours", neighbours, 1)

    @abstractmethod
    def score(self, subject: AttackTarget, target: str, phi: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Score the candidates.

        Args:
            subject: the run.
            target: what is attacked.
            phi: how sure the target is of each candidate, [n].
            groups: candidates of one model, int [n].

        Returns:
            [n], larger for members; NaN for who cannot be scored.
        """

    def run(self, subject: AttackTarget) -> AttackResult:
        """Score the candidates of every target.

        Raises:
            UserError: there are no candidates, or none of the targets.
        """
        asked, findings = candidates(subject), AttackResult()
        observed = observe(subject, self.neighbours)
        for target in (name for name in self.targets if name in observed):
            groups = np.zeros_like(asked.owner) if target == "student" else asked.owner
            values = self.score(subject, target, observed[target], groups)
            known = ~np.isnan(values)
            owners = [client for client in subject.clients if client.id in set(asked.owner[known].tolist())]
            policy = subject.server.privacy or _POLICY
            proven = max((protection(subject, client, target, policy) for client in owners), default=np.inf)
            members, others = values[known & asked.member], values[known & ~asked.member]
            if len(members) and len(others):
                findings.curves.append(MembershipScores(target, members, others, proven, policy.delta))
                findings.arrays[f"{target}/scores"] = values
        if not findings.curves:
            raise UserError(f"{self.label}: the run has no {' and no '.join(self.targets)} that could be attacked")
        findings.arrays["members"], findings.arrays["owners"] = asked.member, asked.owner
        return findings


class LossThreshold(MembershipInference):
    """Whoever has the smaller loss was trained on (Yeom et al., 2018); needs no shadow models."""

    name = "loss_threshold"

    def score(self, subject: AttackTarget, target: str, phi: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Minus the loss."""
        return scores.loss_threshold(phi)


class ShadowInference(MembershipInference):
    """Base of the attacks that compare a target with shadows of it.

    Args:
        shadows: how many shadow federations are run, even and at least 2; attacks of one audit share them.
        online: use shadows that were trained on a candidate, too; an attacker who learns of a candidate only after the
            shadows were trained has none.
        targets: as in `MembershipInference`.
        neighbours: likewise.
        label: as in `Attack`.
    """

    def __init__(
        self,
        shadows: int = 16,
        online: bool = True,
        targets: list[Target] | None = None,
        neighbours: int = 3,
        label: str | None = None,
    ):
        super().__init__(targets, neighbours, label)
        self.shadows, self.online = at_least("shadows", shadows, 2), online
        if shadows % 2:
            raise UserError(f"shadows must be even, since two of them share out the candidates; got {shadows}")

    def score(self, subject: AttackTarget, target: str, phi: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Compare with the shadows."""
        known = shadows(subject, self.shadows, self.neighbours)
        return self.compare(phi, known.signals[target], known.inside, groups)

    @abstractmethod
    def compare(self, phi: np.ndarray, others: np.ndarray, inside: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Score samples; arguments as of `fdl.attacks.scores.lira`."""


class LiRA(ShadowInference):
    """Likelihood ratio of Gaussians fitted to shadow models with and without the sample (Carlini et al., 2022)."""

    name = "lira"

    def compare(self, phi: np.ndarray, others: np.ndarray, inside: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Log-likelihood ratio; offline, how far a sample is above those that were not trained on."""
        return scores.lira(phi, others, inside, groups, self.online)


class RMIA(ShadowInference):
    """Share of other samples that a sample beats in its likelihood ratio (Zarifzadeh et al., 2024).

    Args:
        gamma: by which factor, > 0.
        a: offline, how much surer a model is of what it was trained on, in [0, 1].
        shadows: as in `ShadowInference`.
        online: likewise.
        targets: as in `MembershipInference`.
        neighbours: likewise.
        label: as in `Attack`.
    """

    name = "rmia"

    def __init__(
        self,
        gamma: float = 1.0,
        a: float = 0.3,
        shadows: int = 16,
        online: bool = True,
        targets: list[Target] | None = None,
        neighbours: int = 3,
        label: str | None = None,
    ):
        super().__init__(shadows, online, targets, neighbours, label)
        if not 0 <= a <= 1:
            raise UserError(f"a must be in [0, 1], got {a}")
        self.gamma, self.a = positive("gamma", gamma), a

    def compare(self, phi: np.ndarray, others: np.ndarray, inside: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Share of the samples that are beaten."""
        return scores.rmia(phi, others, inside, groups, self.online, self.gamma, self.a)


def protection(subject: AttackTarget, client: Client, target: str, policy: Policy) -> float:
    """ε(δ) of one example of a client with respect to a target, from the accounts of the run.

    What leaves a client is covered by all that its account lists, and the student by what the server noted, too. A
    specialist never left its client, and is covered only by noise in its own training.
    """
    events = list(events_of(client))
    client.offload_state(changed=False)
    if target == "student":
        events += events_of(subject.server)
    if target == "specialists":
        events = [event for event in events if event["mechanism"] == _TRAINING]
    return epsilon(events, policy.delta, policy.accountant)
