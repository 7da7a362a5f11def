"""Gradient inversion: private images from the gradients or the parameters that a client sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fdl.attacks.base import Attack, AttackResult
from fdl.attacks.image_quality import Scale, draw_same_classes, gallery, match_by_psnr, psnr, ssim
from fdl.attacks.matching import MATCHINGS, Search, gradients, infer_labels, set_training_mode, solve_analytically
from fdl.attacks.updates import Update, observe_update
from fdl.errors import UserError
from fdl.utils.arguments import at_least, not_negative, one_of, positive
from fdl.utils.seeding import numpy_stream, torch_stream

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.participants import Client

INVERSION_TARGETS = ("gradient", "update")

_MAX_IMAGES = 256
"""Maximum number of private images with which a reconstruction is compared."""


class GradientInversion(Attack):
    """Reconstructs images whose gradients match those that a client's upload reveals.

    The target ``update`` is what a real server has: the client's local update is repeated, in a copy of the run, from
    the weights that it received to those that its upload contains after the codecs, and (w_before − w_after) / (η ·
    steps) approximates the gradient of one batch. This is exact for one step of plain SGD; after more steps it is a
    mean over the trajectory and over all samples that were trained on. The target ``gradient`` is the worst case: the
    exact gradient of one private batch at the same weights, for the same tensors. If only low-rank updates, prompts or
    a head are trained and sent, only their gradients are matched.

    Reconstructions are paired with the private images of the target such that the sum of PSNR is largest, and measured
    by PSNR and SSIM on pixels in [0, 1]. The best of many matches looks good by chance, so the same is measured for as
    many held-out images of the same classes (``psnr_held_out``, ``ssim_held_out``): the excess over these is leakage.

    Sources: Zhu et al., "Deep Leakage from Gradients" (DLG), 2019; Zhao et al., "iDLG", 2020; Geiping et al.,
    "Inverting Gradients", 2020, whose images of 32×32 took 24,000 steps with a weight of 0.2 for total variation.

    Args:
        targets: ``"gradient"`` and ``"update"``; by default both.
        moment: ``"first"`` attacks the first round, when models are untrained and gradients reveal most; ``"last"``
            the local update that would follow the last round.
        matching: ``"cosine"`` (Geiping et al.), ``"l2"`` (DLG), or ``"analytic"``, which solves for the image if the
            student's first layer is linear with a bias; exact for one image.
        batch_size: number of images reconstructed jointly, and size of the private batch of ``gradient``.
        steps: iterations; L-BFGS and signed Adam need some hundreds for small images.
        lr: Adam's learning rate for ``"cosine"``.
        tv: weight of total variation, ≥ 0.
        restarts: number of random starts, of which the one with the smallest objective is used.
        clients: number of attacked clients, those with the lowest ids.
        label: name under which the results are recorded; default `name`.

    Raises:
        UserError: for values out of range.
    """

    name = "gradient_inversion"

    def __init__(
        self,
        targets: list[Literal["gradient", "update"]] | None = None,
        moment: Literal["first", "last"] = "first",
        matching: Literal["cosine", "l2", "analytic"] = "cosine",
        batch_size: int = 1,
        steps: int = 500,
        lr: float = 0.1,
        tv: float = 0.0,
        restarts: int = 1,
        clients: int = 2,
        label: str | None = None,
    ):
        super().__init__(label)
        self.targets = tuple(
            INVERSION_TARGETS if targets is None else (one_of("targets", t, INVERSION_TARGETS) for t in targets)
        )
        self.first = one_of("moment", moment, ("first", "last")) == "first"
        self.matching, self.batch_size = one_of("matching", matching, MATCHINGS), at_least("batch_size", batch_size, 1)
        self.search = Search(matching, at_least("steps", steps, 1), positive("lr", lr), not_negative("tv", tv))
        self.restarts, self.clients = at_least("restarts", restarts, 1), at_least("clients", clients, 1)
        if matching == "analytic" and batch_size > 1:
            raise UserError(f"matching: analytic solves for one image, so batch_size must be 1, got {batch_size}")

    def run(self, subject: AttackTarget) -> AttackResult:
        """Attack the first clients.

        Args:
            subject: the run.

        Raises:
            UserError: the data are no images, clients send no parameters of a model that the server knows, or the
                analytic solution does not apply to the model's first layer.
        """
        findings, found = AttackResult(), {target: [] for target in self.targets}
        scale = Scale(subject.server.test)
        holders = [client for client in subject.clients if len(client.train)][: self.clients]
        seen = [(client, observe_update(subject, client, self.first)) for client in holders]
        if not any(turn for _, turn in seen):
            raise UserError(
                f"{self.label}: not applicable: under {subject.method.name} clients send no parameters of a model that "
                "the server sent them, so there are no gradients to invert"
            )
        for client, turn in seen:
            if turn is not None:
                set_training_mode(turn.model)
                for target in self.targets:
                    found[target].append(self._attack(subject, client, turn, target, scale))
        for target, attacked in found.items():
            self._record(findings, target, attacked)
        if any(one.labels_given for attacked in found.values() for one in attacked):
            findings.notes.append(f"{self.label}: classes were given: no gradients of a classification layer are sent")
        findings.notes += self._notes([turn for _, turn in seen if turn is not None])
        return findings

    def _attack(self, subject: AttackTarget, client: Client, turn: Update, target: str, scale: Scale) -> _Found:
        """Reconstruct images of one client, and compare them with its private images."""
        device = next(iter(turn.mean_gradient.values())).device
        purpose = f"attack/{self.name}/{target}"
        stream = numpy_stream(subject.seed, purpose, self.first, client.id)
        if target == "gradient":
            rows = torch.from_numpy(stream.permutation(len(client.train))[: self.batch_size])
        else:
            rows = turn.rows[torch.from_numpy(stream.permutation(len(turn.rows))[:_MAX_IMAGES])]
        private, labels = client.train.batch(rows)
        seen = turn.mean_gradient
        if target == "gradient":
            seen = gradients(turn.model, seen, private.to(device), labels.to(device))
        count = min(self.batch_size, len(rows if target == "gradient" else turn.rows))
        guessed = infer_labels(turn.model, seen, count, subject.server.num_classes)
        # a server knows the number of samples; without a head's gradients their classes are assumed to be known
        sought = labels[:count] if guessed is None else guessed
        images = self._reconstruct(subject, client, turn, seen, sought.to(device), scale, purpose)
        test = subject.server.test
        others = draw_same_classes(labels, test.labels, stream)
        if target == "update" and 0 < len(others) < len(labels):  # the best of more is better: equal numbers are fair
            private = private[draw_same_classes(test.labels[others], labels, stream)]
        return _Found.of(
            client.id,
            scale.to_pixels(images),
            scale.to_pixels(private),
            scale.to_pixels(test.batch(others)[0]),
            labels_given=guessed is None,
            labels=None if guessed is None or target != "gradient" else _agreement(guessed, labels),
        )

    def _reconstruct(
        self,
        subject: AttackTarget,
        client: Client,
        turn: Update,
        seen: dict[str, Tensor],
        labels: Tensor,
        scale: Scale,
        purpose: str,
    ) -> Tensor:
        if self.matching == "analytic":
            solved = solve_analytically(turn.model, seen, scale.shape)
            if solved is None:
                raise UserError(
                    f"{self.label}: matching: analytic needs a student whose first layer is linear with a bias, "
                    "trained and sent; take cosine or l2"
                )
            return solved
        streams = [torch_stream(subject.seed, f"{purpose}/{i}", self.first, client.id) for i in range(self.restarts)]
        tries = [self.search(turn.model, seen, labels, scale, stream) for stream in streams]
        return min(tries, key=lambda found: found[1])[0]

    def _record(self, findings: AttackResult, target: str, attacked: Sequence[_Found]) -> None:
        """Record means over clients, arrays, and a figure."""
        for name in ("psnr", "ssim", "psnr_held_out", "ssim_held_out", "labels"):
            values = [getattr(one, name) for one in attacked if getattr(one, name) is not None]
            if values:
                findings.metrics[f"{target}/{name}"] = sum(values) / len(values)
        images, private = (torch.cat([getattr(one, part) for one in attacked]) for part in ("images", "private"))
        findings.arrays |= {f"{target}/reconstructed": images.numpy(), f"{target}/private": private.numpy()}
        columns = [f"client {one.client}\n{value:.1f} dB" for one in attacked for value in one.decibels]
        shown = {"private": private[:12], "reconstructed": images[:12]}
        title = f"{self.label}: images from a client's {target}"
        findings.figures[target] = lambda: gallery(shown, columns[:12], title)

    def _notes(self, turns: Sequence[Update]) -> list[str]:
        """Describe the conditions under which the metrics hold."""
        turn, notes = turns[0], []
        normalised = any(isinstance(module, _BatchNorm) for module in turn.model.modules())
        mode = "in training mode, by the statistics of the batch" if normalised else "none"
        when = "of the first round" if self.first else "after the last round"
        images = "image" if self.batch_size == 1 else "images together"
        notes.append(f"{self.label}: {self.batch_size} {images}, weights {when}, batch normalisation: {mode}")
        if "update" in self.targets:
            used = sorted({len(turn.rows) for turn in turns})
            count = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
            notes.append(f"{self.label}: an update is of {turn.steps} step(s) on {count} private image(s)")
            if not turn.plain_sgd:
                notes.append(f"{self.label}: clients train by more than plain SGD, so an update is no mean gradient")
        return notes


@dataclass(frozen=True, eq=False)
class _Found:
    """Reconstructions for one client: pairs of images, means of their metrics, and PSNR per pair.

    `labels` is the fraction of labels inferred correctly, and `labels_given` is True if labels were given instead.
    """

    client: int
    images: Tensor
    private: Tensor
    decibels: list[float]
    psnr: float
    ssim: float
    psnr_held_out: float | None
    ssim_held_out: float | None
    labels_given: bool
    labels: float | None

    @classmethod
    def of(cls, client: int, images: Tensor, private: Tensor, others: Tensor, **known: Any) -> _Found:
        """Pair reconstructions with private and with held-out images, and measure both."""
        rows, matches = match_by_psnr(images, private)
        pairs, truth = images[rows], private[matches]
        decibels = psnr(pairs, truth).diagonal()
        held_out = (None, None)
        if len(others):
            own, theirs = match_by_psnr(images, others)
            chance = images[own], others[theirs]
            held_out = tuple(float(measure(*chance).diagonal().mean()) for measure in (psnr, ssim))
        similar = float(ssim(pairs, truth).diagonal().mean())
        return cls(client, pairs, truth, decibels.tolist(), float(decibels.mean()), similar, *held_out, **known)


def _agreement(guessed: Tensor, labels: Tensor) -> float:
    """Compute the fraction of labels that were inferred correctly, in any order."""
    size = int(max(guessed.max(), labels.max())) + 1
    return float(torch.minimum(guessed.bincount(minlength=size), labels.bincount(minlength=size)).sum() / len(labels))
