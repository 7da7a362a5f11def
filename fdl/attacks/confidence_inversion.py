"""Reconstruction of private samples, or of means of them, from the distances that log-weights reveal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fdl.attacks.base import Attack, AttackResult
from fdl.attacks.confidence_inference import confidence_of
from fdl.encoders.base import PCA
from fdl.errors import UserError
from fdl.knowledge.confidence.base import public_space
from fdl.knowledge.confidence.density import Density
from fdl.utils.arguments import at_least
from fdl.utils.seeding import torch_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdl.attacks.base import AttackTarget
    from fdl.participants import Client

_START = 0.1
"""Standard deviation of the starting points around public samples, in units of the typical distance."""


class ConfidenceInversion(Attack):
    """Solves for the private points whose distances to public samples a client's `density` confidences encode.

    Typical distance, dimension and public space follow from the proxy set, so each log-weight is converted back into
    the mean distance of a proxy sample to the client's k nearest points. With hundreds of proxy samples there are more
    equations than a small site has coordinates. Points are initialised near the public samples with the smallest
    distances, and Adam minimises the squared error. The number of points is assumed to be known.

    Reconstructed points are matched one to one with the private samples (the assignment of least total distance).
    Metrics are their ``distance`` in the public space, in units of the typical distance; as a baseline the distance of
    as many public samples, chosen and matched in the same way (``distance_public``); and the fraction of private
    samples that are approximated to within a tenth of the typical distance (``found``). If the space is a PCA of
    images, ``psnr`` and ``psnr_public`` express the same as a PSNR of pixels in decibels. Metrics are medians over the
    samples of all attacked clients.

    Args:
        largest: clients with more private samples than this are not attacked.
        steps: steps of Adam per start.
        starts: number of random starts, of which the best fit is used.
        label: name under which the results are recorded; default `name`.
    """

    name = "confidence_inversion"

    def __init__(self, largest: int = 8, steps: int = 1500, starts: int = 4, label: str | None = None):
        super().__init__(label)
        self.largest, self.steps = at_least("largest", largest, 1), at_least("steps", steps, 1)
        self.starts = at_least("starts", starts, 1)

    def run(self, subject: AttackTarget) -> AttackResult:
        """Attack all small clients.

        Args:
            subject: the run.

        Raises:
            UserError: clients do not weight predictions by the distance to their nearest samples.
        """
        confidence = confidence_of(subject, self.label)
        if not isinstance(confidence, Density) or confidence.method != "neighbours":
            raise UserError(f"{self.label}: not applicable: confidences are no distances to nearest samples (density)")
        found = []
        for client in subject.clients:
            if 0 < len(client.train) <= self.largest:
                answers = subject.received_responses(client)
                if answers is not None and answers.confidence is not None:
                    rows = np.arange(len(client.proxy)) if answers.rows is None else answers.rows.numpy()
                    log_weights = answers.confidence.values().double().numpy()
                    found.append(self.attack(confidence, client, rows, log_weights, subject.seed))
        findings = AttackResult(metrics={"clients": float(len(found))})
        if not found:
            findings.notes.append(f"{self.label}: no client has {self.largest} samples or fewer")
            return findings
        names = [name for name in found[0].measured if all(name in one.measured for one in found)]
        for name in names:
            findings.metrics[name] = float(np.median(np.concatenate([one.measured[name] for one in found])))
        findings.metrics["found"] = float(np.mean(np.concatenate([one.measured["distance"] for one in found]) < 0.1))
        findings.arrays["reconstructed"] = np.concatenate([one.points for one in found])
        return findings

    def attack(
        self, confidence: Density, client: Client, rows: np.ndarray, log_weights: np.ndarray, seed: int
    ) -> Reconstruction:
        """Reconstruct one client's points.

        Args:
            confidence: the confidence by which the client weights its predictions.
            client: the attacked client, with whose samples the points are compared.
            rows: proxy rows for which the client sent predictions, int [m].
            log_weights: received log-weights of these rows, float64 [m].
            seed: seed of the run.
        """
        space = public_space(client)
        public, own = space.encode_public(client.proxy), space.encode(client.train).astype(np.float64)
        distances, typical = confidence.distances(log_weights, public), confidence.typical(public)
        public = public[rows].astype(np.float64)
        best = None
        for start in range(self.starts):
            stream = torch_stream(seed, f"attack/{self.name}/{start}", 0, client.id)
            error, points = _fit(public, distances, len(own), confidence.k, typical, self.steps, stream)
            if best is None or error < best[0]:
                best = error, points
        points = best[1]
        measured, images = {}, _images(space, client)
        for name, others in (("", points), ("_public", public)):
            mine, theirs, lengths = _match(own, others)
            measured[f"distance{name}"] = lengths / typical
            if images is not None:
                private, decode = images
                error = np.square(private[mine] - decode(others[theirs])).mean(1)
                measured[f"psnr{name}"] = -10 * np.log10(np.maximum(error, 1e-10))
        return Reconstruction(points, measured)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Points reconstructed for one client, [n, d], and error measures per private sample by name, [n]."""

    points: np.ndarray
    measured: dict[str, np.ndarray]


def _fit(
    public: np.ndarray, distances: np.ndarray, count: int, k: int, unit: float, steps: int, stream: torch.Generator
) -> tuple[float, np.ndarray]:
    """Fit points to the mean distances of proxy samples.

    Returns:
        The remaining mean squared error, and the points, [count, d].
    """
    rows, wanted = torch.from_numpy(public), torch.from_numpy(distances)
    near = wanted.argsort(stable=True)[: max(6 * count, count)]
    chosen = near[torch.randperm(len(near), generator=stream)[:count]]
    chosen = chosen[torch.arange(count) % len(chosen)]
    noise = torch.randn(count, public.shape[1], generator=stream, dtype=torch.float64)
    points = (rows[chosen] + _START * unit * noise).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=unit / 30)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = (_mean_distance(rows, points, k) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return float(loss.detach()), points.detach().numpy()


def _mean_distance(rows: Tensor, points: Tensor, k: int) -> Tensor:
    distances = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(min(k, len(points)), dim=1, largest=False).values.mean(1)


def _match(own: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match private samples one to one with other points; return both rows and the distances of the pairs."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    lengths = cdist(own, others)
    mine, theirs = linear_sum_assignment(lengths)
    return mine, theirs, lengths[mine, theirs]


def _images(space: object, client: Client) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]] | None:
    """Return the flattened private inputs and the space's decoder to inputs; None if it has no decoder."""
    if not isinstance(space, PCA):
        return None
    private = client.train.batch(torch.arange(len(client.train)))[0].flatten(1).double().numpy()
    return private, space.decode
