"""Membership inference: detection of the samples that a client trained on."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

import numpy as np

from fdl.attacks import scores
from fdl.attacks.base import Attack, AttackResult, MembershipScores
from fdl.attacks.candidates import candidates
from fdl.attacks.shadows import observe_signals, run_shadow_federations
from fdl.attacks.signals import MEMBERSHIP_TARGETS
from fdl.errors import UserError
from fdl.privacy.accounting import Policy, epsilon, events_of
from fdl.utils.arguments import at_least, one_of, positive

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.participants import Client

Target = Literal["student", "specialists", "responses"]

_TRAINING = "dp_sgd"
"""The mechanism that protects a specialist itself; all others protect only messages that leave the client."""

_POLICY = Policy(1e-5)
"""Default for recipes without a privacy section, which give no δ."""


class MembershipInference(Attack):
    """Base class of attacks that score candidates; an instance holds settings only.

    The student is evaluated on all candidates, each client's specialist on the candidates of that client. The server
    also receives a client's predictions on the proxy set (and confidences, which `confidence_inference` attacks); the
    predictions on the proxy samples nearest to a candidate approximate the model's prediction on the candidate, for
    shadow models as well (after Distillation-LiRA, arXiv 2502.08001, which instead distils a model from the predictions
    and evaluates that).

    Args:
        targets: attacked objects among ``"student"``, ``"specialists"`` and ``"responses"``; by default all that the
            run has.
        neighbours: number of proxy samples that approximate a candidate, at least 1.
        label: name under which the results are recorded; default `name`.
    """

    def __init__(
        self,
        targets: list[Target] | None = None,
        neighbours: int = 3,
        label: str | None = None,
    ):
        super().__init__(label)
        self.targets = tuple(
            MEMBERSHIP_TARGETS if targets is None else (one_of("targets", name, MEMBERSHIP_TARGETS) for name in targets)
        )
        self.neighbours = at_least("neighbours", neighbours, 1)

    @abstractmethod
    def score(self, subject: AttackTarget, target: str, phi: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Score the candidates.

        Args:
            subject: the run.
            target: name of the attacked object.
            phi: the target's log-odds φ of each candidate's true class, [n].
            groups: number of the model that each candidate belongs to, int [n].

        Returns:
            Scores, [n], larger for members; NaN for candidates that cannot be scored.
        """

    def run(self, subject: AttackTarget) -> AttackResult:
        """Score the candidates of every target.

        Args:
            subject: the run.

        Raises:
            UserError: there are no candidates, or the run has none of the targets.
        """
        queries, findings = candidates(subject), AttackResult()
        observed = observe_signals(subject, self.neighbours)
        for target in (name for name in self.targets if name in observed):
            groups = np.zeros_like(queries.owner) if target == "student" else queries.owner
            values = self.score(subject, target, observed[target], groups)
            known = ~np.isnan(values)
            owners = [client for client in subject.clients if client.id in set(queries.owner[known].tolist())]
            policy = subject.server.privacy or _POLICY
            proven = max((proven_epsilon(subject, client, target, policy) for client in owners), default=np.inf)
            members, others = values[known & queries.member], values[known & ~queries.member]
            if len(members) and len(others):
                findings.curves.append(MembershipScores(target, members, others, proven, policy.delta))
                findings.arrays[f"{target}/scores"] = values
        if not findings.curves:
            raise UserError(f"{self.label}: the run has no {' and no '.join(self.targets)} that could be attacked")
        findings.arrays["members"], findings.arrays["owners"] = queries.member, queries.owner
        return findings


class LossThreshold(MembershipInference):
    """Membership by loss: samples with smaller loss are taken for members (Yeom et al., 2018); needs no shadow models.

    Args:
        targets: attacked objects; by default all that the run has.
        neighbours: number of proxy samples that approximate a candidate, at least 1.
        label: name under which the results are recorded; default `name`.
    """

    name = "loss_threshold"

    def score(self, subject: AttackTarget, target: str, phi: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Return the negative loss per candidate, [n].

        Args:
            subject: the run.
            target: name of the attacked object.
            phi: log-odds of each candidate's true class, [n].
            groups: number of the model that each candidate belongs to, int [n]; unused.
        """
        return scores.loss_threshold(phi)


class ShadowInference(MembershipInference):
    """Base class of attacks that compare a target with shadow models.

    Args:
        shadows: number of shadow federations, even and at least 2; attacks of one audit share them.
        online: use also shadows that were trained on a candidate; an attacker who gets a candidate only after the
            shadows were trained (offline) has none.
        targets: attacked objects; by default all that the run has.
        neighbours: number of proxy samples that approximate a candidate, at least 1.
        label: name under which the results are recorded; default `name`.
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
        """Score the candidates by comparison with shadow federations.

        Args:
            subject: the run.
            target: name of the attacked object.
            phi: log-odds of each candidate's true class, [n].
            groups: number of the model that each candidate belongs to, int [n].
        """
        known = run_shadow_federations(subject, self.shadows, self.neighbours)
        return self.compare(phi, known.signals[target], known.inside, groups)

    @abstractmethod
    def compare(self, phi: np.ndarray, others: np.ndarray, inside: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Score candidates by comparison with shadow models.

        Args:
            phi: log-odds of the attacked model, [n].
            others: log-odds of shadow models, [S, n]; NaN where a shadow has none.
            inside: True where a shadow was trained on a candidate, bool [S, n].
            groups: number of the model that each candidate belongs to, int [n].

        Returns:
            Scores, [n], larger for members.
        """


class LiRA(ShadowInference):
    """Likelihood ratio of Gaussians fitted to shadow models with and without the sample (Carlini et al., 2022).

    Args:
        shadows: number of shadow federations, even and at least 2.
        online: use also shadows that were trained on a candidate.
        targets: attacked objects; by default all that the run has.
        neighbours: number of proxy samples that approximate a candidate, at least 1.
        label: name under which the results are recorded; default `name`.
    """

    name = "lira"

    def compare(self, phi: np.ndarray, others: np.ndarray, inside: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Compute log-likelihood ratios; offline, the log tail probability under models not trained on the sample.

        Args:
            phi: log-odds of the attacked model, [n].
            others: log-odds of shadow models, [S, n]; NaN where a shadow has none.
            inside: True where a shadow was trained on a candidate, bool [S, n].
            groups: number of the model that each candidate belongs to, int [n].
        """
        return scores.lira(phi, others, inside, groups, self.online)


class RMIA(ShadowInference):
    """Fraction of other samples whose likelihood ratio a sample exceeds by a factor (Zarifzadeh et al., 2024).

    Args:
        gamma: the factor γ, > 0.
        a: offline, coefficient of the linear model of p(x) on samples trained on, in [0, 1]; smaller for stronger
            overfitting.
        shadows: number of shadow federations, even and at least 2.
        online: use also shadows that were trained on a candidate.
        targets: attacked objects; by default all that the run has.
        neighbours: number of proxy samples that approximate a candidate, at least 1.
        label: name under which the results are recorded; default `name`.
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
        """Compute the fraction of exceeded samples.

        Args:
            phi: log-odds of the attacked model, [n].
            others: log-odds of shadow models, [S, n]; NaN where a shadow has none.
            inside: True where a shadow was trained on a candidate, bool [S, n].
            groups: number of the model that each candidate belongs to, int [n].
        """
        return scores.rmia(phi, others, inside, groups, self.online, self.gamma, self.a)


def proven_epsilon(subject: AttackTarget, client: Client, target: str, policy: Policy) -> float:
    """Compute ε(δ) of one example of a client with respect to a target, from the run's privacy accounts.

    Messages of a client are covered by all events of its account, and the student also by the server's events. A
    specialist never leaves its client, and is covered only by noise in its own training.

    Args:
        subject: the run.
        client: the client.
        target: name of the attacked object.
        policy: δ and the accountant.
    """
    events = list(events_of(client))
    client.offload_state(changed=False)
    if target == "student":
        events += events_of(subject.server)
    if target == "specialists":
        events = [event for event in events if event["mechanism"] == _TRAINING]
    return epsilon(events, policy.delta, policy.accountant)
