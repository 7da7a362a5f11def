"""Membership signals: a model's log-odds of each sample's true class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fdl.encoders.base import Pixels

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.attacks.candidates import Candidates
    from fdl.datamodules.samples import Samples
    from fdl.messages import Responses
    from fdl.participants import Server

MEMBERSHIP_TARGETS = ("student", "specialists", "responses")
"""Objects with a φ: the global model, each client's own model, and each client's predictions on the proxy set.

Confidences are sent, too, and attacked by `fdl.attacks.confidence_inference`.
"""

_LEAST = 1e-7
"""Lower bound of probabilities, which may be 0 after quantisation."""


def log_odds(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    """Compute φ = ln p_y − ln(1 − p_y), the logit of the true class's probability (Carlini et al., 2022, eq. 3).

    Computed as z_y − ln Σ_{c≠y} exp z_c: the difference of two rounded logarithms would lose all digits near p_y = 1.

    Args:
        logits: logits z, [n, C] with C ≥ 2.
        labels: true classes y, int64 [n].

    Returns:
        φ, float64 [n].
    """
    logits = logits.double()
    true = torch.from_numpy(labels)[:, None]
    others = logits.scatter(1, true, -torch.inf).logsumexp(1)
    return (logits.gather(1, true).squeeze(1) - others).numpy()


def signals(subject: AttackTarget, candidates: Candidates, neighbours: np.ndarray | None) -> dict[str, np.ndarray]:
    """Compute φ of every candidate for every target.

    Args:
        subject: a run, or a shadow of it.
        candidates: the n candidates.
        neighbours: rows of the proxy set near each candidate, int64 [n, k]; None without a proxy set.

    Returns:
        φ by target, float64 [n] each: of the student, of the specialist of the candidate's client, and of that client's
        predictions on the proxy rows near the candidate. NaN where a client has no specialist or sent no predictions;
        targets that the run does not have are left out.
    """
    found: dict[str, np.ndarray] = {}
    if subject.server.student is not None:
        logits = subject.server.predict(subject.server.student, candidates.samples)
        found["student"] = log_odds(logits, candidates.labels)
    for client in subject.clients:
        mine = np.flatnonzero(candidates.owner == client.id)
        if len(mine) == 0:
            continue
        labels = candidates.labels[mine]
        if "specialist" in client.state:
            with client.turn():
                logits = client.predict(client.specialist(), candidates.samples.subset(mine))
            found.setdefault("specialists", _all_nan(candidates))[mine] = log_odds(logits, labels)
        client.offload_state(changed=False)
        answers = None if neighbours is None else subject.received_responses(client)
        if answers is not None:
            near = response_signals(answers, neighbours[mine], labels, len(client.proxy))
            found.setdefault("responses", _all_nan(candidates))[mine] = near
    return found


def response_signals(answers: Responses, neighbours: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Compute φ of the mean prediction on the proxy rows near each sample.

    Args:
        answers: received probabilities or logits of some or all proxy rows.
        neighbours: proxy rows near each sample, int64 [n, k].
        labels: classes of the samples, int64 [n].
        count: size of the proxy set.

    Returns:
        φ, float64 [n]; NaN for samples without predictions on any neighbour.
    """
    rows = np.arange(len(answers.values)) if answers.rows is None else answers.rows.numpy()
    table = np.full((count, answers.values.shape[1]), np.nan)
    table[rows] = probabilities(answers)
    near = table[neighbours, labels[:, None]]
    answered = ~np.isnan(near)
    total = np.where(answered, near, 0.0).sum(1)
    p = np.divide(total, answered.sum(1), out=np.full(len(near), np.nan), where=answered.any(1))
    p = np.clip(p, _LEAST, 1 - _LEAST)
    return np.log(p) - np.log1p(-p)


def probabilities(answers: Responses) -> np.ndarray:
    """Convert received predictions to probabilities.

    Args:
        answers: probabilities or logits of n proxy rows.

    Returns:
        Probabilities, float64 [n, C].
    """
    values = answers.values.double()
    if answers.form == "logits":
        return torch.softmax(values, dim=1).numpy()
    return (values / values.sum(1, keepdim=True).clamp_min(_LEAST)).numpy()


def nearest_proxy_rows(server: Server, samples: Samples, count: int) -> np.ndarray:
    """Find the proxy samples nearest to each sample, in the public encoder's space, or else in that of the inputs.

    Args:
        server: the server, with the proxy set and optionally an encoder.
        samples: the n samples.
        count: number of neighbours k; bounded by the size of the proxy set.

    Returns:
        Rows of the proxy set, int64 [n, k].
    """
    from sklearn.neighbors import NearestNeighbors

    encoder = server.encoder or Pixels()
    search = NearestNeighbors(n_neighbors=min(count, len(server.proxy))).fit(encoder.encode_public(server.proxy))
    return search.kneighbors(encoder.encode(samples), return_distance=False)


def _all_nan(candidates: Candidates) -> np.ndarray:
    return np.full(len(candidates.owner), np.nan)
