"""Inversion network: reconstructs an image from the predictions of the server and of a client."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 1e-4
"""Lower bound of probabilities in logarithms."""


class Inversion(nn.Module):
    """Perceptron that maps two participants' class probabilities of an image to the image.

    Args:
        ours: the server's probabilities of the training images, [n, C]; with the client's they determine the range to
            which inputs are clamped.
        theirs: the client's probabilities, [n, C].
        shape: (C, H, W) of an image.
        width: width of both hidden layers.
    """

    def __init__(self, ours: Tensor, theirs: Tensor, shape: tuple[int, ...], width: int):
        super().__init__()
        x = _logs(ours, theirs)
        self.low, self.high, self.mean = x.amin(0), x.amax(0), x.mean(0)
        # a feature that hardly varies carries hardly any information, and would otherwise be amplified to noise
        self.spread = x.std(0, correction=0).clamp_min(0.1)
        layers = [nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, math.prod(shape)), nn.Unflatten(1, shape))

    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Reconstruct images from pairs of predictions.

        Args:
            ours: the server's probabilities, [n, C].
            theirs: the client's probabilities, [n, C].

        Returns:
            Pixels in (0, 1), [n, C, H, W].
        """
        x = _logs(ours, theirs).clamp(self.low, self.high)
        return torch.sigmoid(self.layers((x - self.mean) / self.spread))

    def learn(
        self,
        ours: Tensor,
        theirs: Tensor,
        images: Tensor,
        steps: int,
        batch_size: int,
        lr: float,
        stream: torch.Generator,
    ) -> None:
        """Minimise the squared error of pixels by Adam; then freeze the network in evaluation mode.

        Args:
            ours: the server's probabilities of public images, [n, C].
            theirs: the client's probabilities of these images, [n, C].
            images: the public images, [n, C, H, W] in [0, 1].
            steps: number of training steps.
            batch_size: samples per step.
            lr: learning rate.
            stream: random generator of the batches.
        """
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(steps):
            rows = torch.randint(len(images), (batch_size,), generator=stream)
            loss = F.mse_loss(self(ours[rows], theirs[rows]), images[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.requires_grad_(False).eval()


def target_pairs(ours: Tensor, theirs: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """Construct the pairs of predictions that represent a client's private images, one pair per class.

    Args:
        ours: the server's probabilities of proxy samples, [n, C].
        theirs: the client's probabilities of the same samples, [n, C].
        gap: fraction by which the server's prediction is interpolated towards its mean prediction, in [0, 1].

    Returns:
        The server's side: its mean log-probability over the samples that the client assigns to the class (or that the
        server assigns to it if the client assigns none), interpolated towards the mean over all samples. The client's
        side: one-hot probabilities of the class. Both [C, C].
    """
    classes = ours.shape[1]
    logs = ours.clamp_min(LEAST).log()
    everywhere = logs.mean(0)
    sides = []
    for label in range(classes):
        rows = theirs.argmax(1) == label
        if not rows.any():
            rows = ours.argmax(1) == label
        own = logs[rows].mean(0) if rows.any() else everywhere
        sides.append((1 - gap) * own + gap * everywhere)
    return torch.stack(sides).exp(), torch.eye(classes, dtype=theirs.dtype)


def mean_public_images(ours: Tensor, images: Tensor) -> Tensor:
    """Compute the mean of the public images that the server assigns to each class.

    Args:
        ours: the server's probabilities, [n, C].
        images: the public images, [n, …].

    Returns:
        One mean image per class, [C, …]; the mean of all images for a class without any.
    """
    best = ours.argmax(1)
    picked = [images[best == label] for label in range(ours.shape[1])]
    return torch.stack([(own if len(own) else images).mean(0) for own in picked])


def _logs(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.cat([ours, theirs], dim=1).clamp_min(LEAST).log().float()
