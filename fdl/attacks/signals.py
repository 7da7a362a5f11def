"""How sure a model is of a sample's true class: all that membership inference looks at."""

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

TARGETS = ("student", "specialists", "responses")
"""What φ can be had of: the global model, each client's own, and what each client answers to the proxy set.

Confidences are sent, too, and attacked by `fdl.attacks.confidence_inference`.
"""

_LEAST = 1e-7
"""Below what a quantised probability may have been 0."""


def log_odds(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    """φ = ln p_y − ln(1 − p_y), the logit of the true class's probability (Carlini et al., 2022, eq. 3).

    Computed as z_y − ln Σ_{c≠y} exp z_c: the difference of two rounded logarithms would lose all digits near p_y = 1.

    Args:
        logits: [n, C] with C ≥ 2.
        labels: int64 [n].

    Returns:
        float64 [n].
    """
    logits = logits.double()
    true = torch.from_numpy(labels)[:, None]
    others = logits.scatter(1, true, -torch.inf).logsumexp(1)
    return (logits.gather(1, true).squeeze(1) - others).numpy()


def signals(subject: AttackTarget, candidates: Candidates, neighbours: np.ndarray | None) -> dict[str, np.ndarray]:
    """φ of every candidate for every target.

    Args:
        subject: a run, or a shadow of it.
        candidates: n samples.
        neighbours: rows of the proxy set near to each candidate, int64 [n, k]; None where there is no proxy set.

    Returns:
        By target, float64 [n]: that of the student, of the specialist of the client of whom it is asked, and of that
        client's answers to the proxy rows near the sample. NaN where a client has no specialist or sent no answers;
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
            found.setdefault("specialists", _nothing(candidates))[mine] = log_odds(logits, labels)
        client.offload_state(changed=False)
        answers = None if neighbours is None else subject.answers(client)
        if answers is not None:
            near = of_answers(answers, neighbours[mine], labels, len(client.proxy))
            found.setdefault("responses", _nothing(candidates))[mine] = near
    return found


def of_answers(answers: Responses, neighbours: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """φ of the mean answer to the proxy rows near each sample.

    Args:
        answers: probabilities or logits as they were received, of some or all proxy rows.
        neighbours: int64 [n, k].
        labels: of the samples, int64 [n].
        count: size of the proxy set.

    Returns:
        float64 [n]; NaN where none of the neighbours was answered.
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
    """What was answered, as probabilities float64 [n, C]."""
    values = answers.values.double()
    if answers.form == "logits":
        return torch.softmax(values, dim=1).numpy()
    return (values / values.sum(1, keepdim=True).clamp_min(_LEAST)).numpy()


def near_rows(server: Server, samples: Samples, count: int) -> np.ndarray:
    """The proxy samples nearest to each sample, in the public encoder's space, or in that of the inputs themselves.

    Args:
        server: has the proxy set and perhaps an encoder.
        samples: n samples.
        count: how many neighbours, k; at most the proxy set.

    Returns:
        int64 [n, k].
    """
    from sklearn.neighbors import NearestNeighbors

    encoder = server.encoder or Pixels()
    search = NearestNeighbors(n_neighbors=min(count, len(server.proxy))).fit(encoder.encode_public(server.proxy))
    return search.kneighbors(encoder.encode(samples), return_distance=False)


def _nothing(candidates: Candidates) -> np.ndarray:
    return np.full(len(candidates.owner), np.nan)
