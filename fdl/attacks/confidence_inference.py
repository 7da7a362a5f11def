"""Membership inference from the confidences that clients send with their predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fdl.attacks.base import Attack, AttackResult, MembershipScores
from fdl.attacks.candidates import candidates
from fdl.attacks.membership import proven_epsilon
from fdl.errors import UserError
from fdl.knowledge.confidence.base import Confidence, public_space
from fdl.privacy.accounting import Policy
from fdl.utils.arguments import at_least
from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.attacks.candidates import Candidates
    from fdl.participants import Client

TARGET = "confidences"
"""Name of the attacked object."""

_POLICY = Policy(1e-5)
"""Default for recipes without a privacy section, which give no δ."""


class ConfidenceInference(Attack):
    """Likelihood ratio of a client's confidences with and without a candidate among its training samples.

    A confidence that is computed from private samples, e.g. `density`, can be computed by an attacker for any set of
    samples, since everything else that it depends on is public; no model has to be trained. The attacker has the same
    knowledge as in differential privacy and in LiRA: all samples of a client except the candidates, of which exactly
    half are members. The attack draws random halves, simulates the confidences that the client would have sent for
    each, and fits, for each proxy sample near a candidate, Gaussians to the log-weights with and without it (Carlini et
    al., 2022, algorithm 1, on log-weights instead of losses). Predictions are those of the client's last model in all
    simulations, so a confidence that depends on predictions alone yields no score and is reported as no better than a
    guess.

    Args:
        simulations: number of halves drawn, even and at least 4; each pair of draws splits the candidates.
        neighbours: number of proxy samples nearest to a candidate that are evaluated, at least 1.
        label: name under which the results are recorded; default `name`.
    """

    name = "confidence_inference"

    def __init__(self, simulations: int = 100, neighbours: int = 20, label: str | None = None):
        super().__init__(label)
        self.simulations, self.neighbours = (
            at_least("simulations", simulations, 4),
            at_least("neighbours", neighbours, 1),
        )
        if simulations % 2:
            raise UserError(f"simulations must be even, since two of them share out the candidates; got {simulations}")

    def run(self, subject: AttackTarget) -> AttackResult:
        """Score the candidates of every client that sends confidences.

        Args:
            subject: the run.

        Raises:
            UserError: there are no candidates, or no client sends confidences.
        """
        confidence = confidence_of(subject, self.label)
        queries, findings = candidates(subject), AttackResult()
        scores, owners = np.full(len(queries.owner), np.nan), []
        for client in subject.clients:
            mine = np.flatnonzero(queries.owner == client.id)
            answers = subject.received_responses(client) if len(mine) else None
            if answers is None or answers.confidence is None:
                continue
            owners.append(client)
            rows = np.arange(len(client.proxy)) if answers.rows is None else answers.rows.numpy()
            inside, simulated = self._simulate(subject, confidence, client, queries)
            near = _nearest(client, queries, mine, rows, self.neighbours)
            seen = answers.confidence.values().double().numpy()
            scores[mine] = likelihood_ratio(seen, simulated[:, rows], inside[:, mine], near, answers.confidence.step)
        known = ~np.isnan(scores)
        members, others = scores[known & queries.member], scores[known & ~queries.member]
        if not (len(members) and len(others)):
            raise UserError(f"{self.label}: no client has sent confidences that could be attacked")
        policy = subject.server.privacy or _POLICY
        proven = max(proven_epsilon(subject, client, TARGET, policy) for client in owners)
        findings.curves.append(MembershipScores(TARGET, members, others, proven, policy.delta))
        findings.arrays[f"{TARGET}/scores"] = scores
        findings.arrays["members"], findings.arrays["owners"] = queries.member, queries.owner
        return findings

    def _simulate(
        self, subject: AttackTarget, confidence: Confidence, client: Client, queries: Candidates
    ) -> tuple[np.ndarray, np.ndarray]:
        """Simulate the log-weights for S random halves of the candidates.

        Returns:
            Masks of the included candidates, bool [S, n], and the log-weights, float64 [S, n_proxy].
        """
        stream = numpy_stream(subject.seed, f"attack/{self.name}", 0, client.id)
        with client.turn():
            logits, space = client.predict(client.specialist(), client.proxy), public_space(client)
        inside, sent = [], []
        for number in range(self.simulations):
            inside.append(queries.halves(stream) if number % 2 == 0 else ~inside[-1])
            twin = client.clone(client.state, queries.share(client, inside[-1]), honest=True)
            twin.cache["encoder"] = space
            with twin.turn():
                sent.append(confidence.log_weights(twin, logits).double().numpy())
        client.offload_state(changed=False)
        return np.stack(inside), np.stack(sent)


def confidence_of(subject: AttackTarget, label: str) -> Confidence:
    """Return the confidence by which the clients of a run weight their predictions.

    Args:
        subject: the run.
        label: label of the calling attack, for the error message.

    Raises:
        UserError: clients send no confidences.
    """
    confidence = subject.method.confidence
    if not isinstance(confidence, Confidence):
        raise UserError(f"{label}: not applicable: clients of this run send no confidences")
    return confidence


def likelihood_ratio(
    seen: np.ndarray, simulated: np.ndarray, inside: np.ndarray, near: np.ndarray, step: float
) -> np.ndarray:
    """Compute Σ over proxy rows of ln N(w; μ_in, σ²) − ln N(w; μ_out, σ²) for each candidate.

    Args:
        seen: received log-weights w, [m].
        simulated: log-weights of S simulated sets of samples, [S, m].
        inside: masks of the candidates that these sets contain, bool [S, n].
        near: rows that are evaluated for each candidate, int [n, r].
        step: step of the quantiser, whose rounding adds a variance of step² / 12.

    Returns:
        Log-likelihood ratios, float64 [n]; 0 where the rows carry no information.
    """
    scores = np.zeros(inside.shape[1])
    for candidate, rows in enumerate(near):
        w, those = seen[rows], inside[:, candidate]
        within, without = simulated[those][:, rows], simulated[~those][:, rows]
        variance = (within.var(0) + without.var(0)) / 2 + max(step, 1e-6) ** 2 / 12
        ratio = (np.square(w - without.mean(0)) - np.square(w - within.mean(0))) / (2 * variance)
        scores[candidate] = ratio.sum()
    return scores


def _nearest(client: Client, queries: Candidates, mine: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Find the predicted proxy rows nearest to each candidate in the public space, int [n, r]."""
    from sklearn.neighbors import NearestNeighbors

    space = public_space(client)
    public, own = space.encode_public(client.proxy)[rows], space.encode(queries.samples.subset(torch.from_numpy(mine)))
    return NearestNeighbors(n_neighbors=min(count, len(rows))).fit(public).kneighbors(own, return_distance=False)
