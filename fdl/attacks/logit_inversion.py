"""Paired-logit inversion: typical private images per class, from a client's predictions on public ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fdl.attacks.base import Attack, AttackResult
from fdl.attacks.image_quality import Scale, draw_same_classes, gallery, psnr, ssim
from fdl.attacks.inversion_network import LEAST, Inversion, mean_public_images, target_pairs
from fdl.attacks.signals import probabilities
from fdl.errors import UserError
from fdl.utils.arguments import at_least, positive
from fdl.utils.seeding import numpy_stream, stream_seed, torch_stream

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.messages import Responses
    from fdl.participants import Client

_MEASURES = {"ssim": ssim, "psnr": psnr}


class LogitInversion(Attack):
    """Trains an inversion network on public images to map pairs of predictions, the server's and a client's, to images.

    The server knows both participants' predictions on every proxy sample. It trains one network per client from these
    pairs to the samples, and then evaluates it at the pair expected for the client's own images: for each class the
    most confident prediction of the client, where the server is less confident (the confidence gap). Inputs are clamped
    to the range of the participants' predictions, so uninformative predictions of a client yield no image of its own.
    The server here is the run's student, which was distilled from clients, while the paper's has seen public data only;
    if the method has no student, the mean of all clients' predictions is used instead.

    A reconstruction is compared with the client's private images of the class, and the nearest is taken. That is near
    by chance and by public knowledge, too, so there are two baselines: the same reconstruction's nearest among as many
    held-out images of the class (``held_out``), and the nearest private image to the mean of the proxy samples that the
    server assigns to this class (``public_mean``). ``ssim_gain`` and ``psnr_gain`` are gains over the better of both;
    at about 0, predictions leak no more than public data do. Metrics are means over clients and classes.

    Source: Takahashi et al., "Breaching FedMD: Image Recovery via Paired-Logits Inversion Attack", CVPR 2023. The
    network here is a perceptron, and the only priors are the proxy samples.

    Args:
        gap: fraction by which the server's prediction is interpolated towards its mean prediction, in [0, 1]; 0 keeps
            its prediction on samples of the class.
        steps: training steps of a network.
        batch_size: samples per step.
        lr: Adam's learning rate.
        width: width of the network's two hidden layers.
        clients: number of attacked clients, those with the lowest ids.
        label: name under which the results are recorded; default `name`.

    Raises:
        UserError: for values out of range.
    """

    name = "logit_inversion"

    def __init__(
        self,
        gap: float = 0.5,
        steps: int = 600,
        batch_size: int = 64,
        lr: float = 0.002,
        width: int = 256,
        clients: int = 4,
        label: str | None = None,
    ):
        super().__init__(label)
        if not 0 <= gap <= 1:
            raise UserError(f"gap must be in [0, 1], got {gap}")
        self.gap, self.lr = gap, positive("lr", lr)
        self.steps, self.batch_size = at_least("steps", steps, 1), at_least("batch_size", batch_size, 1)
        self.width, self.clients = at_least("width", width, 1), at_least("clients", clients, 1)

    def run(self, subject: AttackTarget) -> AttackResult:
        """Attack the first clients.

        Args:
            subject: the run.

        Raises:
            UserError: the data are no images, no client sends predictions, or no class is both held and held out.
        """
        server, scale = subject.server, Scale(subject.server.test)
        holders = [c for c in subject.clients if len(c.train)][: self.clients]
        answered = [(client, a) for client in holders if (a := subject.received_responses(client)) is not None]
        if not answered:
            raise UserError(f"{self.label}: not applicable: no client sends answers to a proxy set")
        images = scale.to_pixels(server.proxy.batch(torch.arange(len(server.proxy)))[0])
        ours = self._server(subject, [answers for _, answers in answered])
        means, found = mean_public_images(ours, images), []
        for client, answers in answered:
            rows, theirs = _table(answers)
            network = self._network(subject, client, ours[rows], theirs, images[rows])
            recovered = network(*target_pairs(ours[rows], theirs, self.gap))
            found += self._compare(subject, client, scale, recovered, means)
        if not found:
            raise UserError(f"{self.label}: no held-out sample has a class that an attacked client holds")
        return self._findings(found)

    def _server(self, subject: AttackTarget, answers: list[Responses]) -> Tensor:
        """Compute the server's probabilities of every proxy sample, float64 [n, C]."""
        server = subject.server
        if server.student is not None:
            return torch.softmax(server.predict(server.student, server.proxy).double(), dim=1)
        total = torch.zeros(len(server.proxy), server.num_classes, dtype=torch.float64)
        for rows, theirs in map(_table, answers):
            total[rows] += theirs
        return (total + LEAST) / (total + LEAST).sum(1, keepdim=True)

    def _network(
        self, subject: AttackTarget, client: Client, ours: Tensor, theirs: Tensor, images: Tensor
    ) -> Inversion:
        """Train a network on one client's predictions."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(subject.seed, f"attack/{self.name}", 0, client.id))
            network = Inversion(ours, theirs, tuple(images.shape[1:]), self.width)
        stream = torch_stream(subject.seed, f"attack/{self.name}/batches", 0, client.id)
        network.learn(ours, theirs, images, self.steps, min(self.batch_size, len(images)), self.lr, stream)
        return network

    def _compare(
        self, subject: AttackTarget, client: Client, scale: Scale, recovered: Tensor, means: Tensor
    ) -> list[_Found]:
        """Measure the reconstruction of every class of the client that also has held-out samples."""
        test, stream = subject.server.test, numpy_stream(subject.seed, f"attack/{self.name}/compared", 0, client.id)
        labels, found = client.train.labels, []
        for label in labels.unique().tolist():
            mine = torch.nonzero(labels == label).squeeze(1)
            others = draw_same_classes(labels[mine], test.labels, stream)
            mine = mine[torch.from_numpy(stream.permutation(len(mine))[: len(others)])]
            if len(others):
                private, held_out = (
                    scale.to_pixels(s.batch(rows)[0]) for s, rows in ((client.train, mine), (test, others))
                )
                found.append(compare_class(client.id, label, recovered[label], means[label], private, held_out))
        return found

    def _findings(self, found: list[_Found]) -> AttackResult:
        findings = AttackResult()
        for name in _MEASURES:
            own, held_out, mean = (np.array([one.scores[name][i] for one in found]) for i in range(3))
            base = held_out if held_out.mean() >= mean.mean() else mean
            findings.metrics |= {
                name: float(own.mean()),
                f"{name}_held_out": float(held_out.mean()),
                f"{name}_public_mean": float(mean.mean()),
                f"{name}_gain": float((own - base).mean()),
            }
            if name == "ssim":
                error = float((own - base).std(ddof=1) / len(own) ** 0.5) if len(own) > 1 else float("inf")
                findings.metrics["ssim_gain_error"] = error if np.isfinite(error) else 0.0
                if not float((own - base).mean()) > 2 * error:
                    findings.notes.append(
                        f"{self.label}: no leakage found: the mean gain in SSIM of {len(found)} image(s) is not above "
                        "two standard errors, so they show what held-out images or public means show, too"
                    )
        parts = {"nearest private": "private", "reconstructed": "image", "public mean": "mean"}
        shown = sorted(found, key=lambda one: one.scores["ssim"][1] - one.scores["ssim"][0])[:12]
        rows = {title: torch.stack([getattr(one, part) for one in shown]) for title, part in parts.items()}
        columns = [f"client {one.client}, {one.label}\nSSIM {one.scores['ssim'][0]:.2f}" for one in shown]
        findings.figures["classes"] = lambda: gallery(
            rows, columns, f"{self.label}: images of classes, largest gains over held-out images first"
        )
        findings.arrays["reconstructed"] = torch.stack([one.image for one in found]).numpy()
        return findings


@dataclass(frozen=True, eq=False)
class _Found:
    """A reconstruction of one class of a client, the nearest private image, and the public mean.

    `scores` holds, by measure, the similarity of the reconstruction to its nearest private image, to its nearest
    held-out image, and of the public mean to its nearest private image.
    """

    client: int
    label: int
    image: Tensor
    private: Tensor
    mean: Tensor
    scores: dict[str, tuple[float, float, float]]


def compare_class(client: int, label: int, image: Tensor, mean: Tensor, private: Tensor, held_out: Tensor) -> _Found:
    """Measure a reconstruction and its baselines.

    Args:
        client: id of the client.
        label: the class.
        image: the reconstruction, [C, H, W] in [0, 1].
        mean: mean of public samples of the class, [C, H, W] in [0, 1].
        private: the client's images of the class, [m, C, H, W].
        held_out: as many images of the class that no client trained on, [m, C, H, W].
    """
    scores, pair = {}, torch.stack([image, mean])
    for name, measure in _MEASURES.items():
        near = measure(pair, private)
        scores[name] = float(near[0].max()), float(measure(pair[:1], held_out).max()), float(near[1].max())
    nearest = int(ssim(pair[:1], private)[0].argmax())
    return _Found(client, label, image, private[nearest], mean, scores)


def _table(answers: Responses) -> tuple[Tensor, Tensor]:
    """Return the predicted proxy rows and their probabilities, [n, C]."""
    table = torch.from_numpy(probabilities(answers))
    return torch.arange(len(table)) if answers.rows is None else answers.rows, table
