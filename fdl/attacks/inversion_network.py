"""What a server learns from pairs of answers to public images, to turn other pairs into images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 1e-4
"""Probability below which logarithms are all the same."""


class Inversion(nn.Module):
    """From two participants' probabilities of a sample to the sample.

    Args:
        ours: the server's, [n, C]; they and the client's say within which range answers lie.
        theirs: the client's, [n, C].
        shape: (C, H, W) of an image.
        width: of both hidden layers.
    """

    def __init__(self, ours: Tensor, theirs: Tensor, shape: tuple[int, ...], width: int):
        super().__init__()
        x = _logs(ours, theirs)
        self.low, self.high, self.mean = x.amin(0), x.amax(0), x.mean(0)
        # what hardly varies says hardly anything, and would otherwise be blown up to noise
        self.spread = x.std(0, correction=0).clamp_min(0.1)
        layers = [nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, math.prod(shape)), nn.Unflatten(1, shape))

    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Images [n, C, H, W] in (0, 1)."""
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
        """Minimise the squared error of pixels, and put the network into evaluation mode, without gradients."""
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(steps):
            rows = torch.randint(len(images), (batch_size,), generator=stream)
            loss = F.mse_loss(self(ours[rows], theirs[rows]), images[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.requires_grad_(False).eval()


def targets(ours: Tensor, theirs: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """Pairs of answers that stand for a client's own images, one pair a class.

    Args:
        ours: the server's probabilities of proxy samples, [n, C].
        theirs: the client's of the same.
        gap: as in `LogitInversion`.

    Returns:
        The server's side: its mean (of logarithms) over the samples that the client puts into the class, or where there
        are none it itself does, drawn towards that over all. The client's side: all on the class. Both [C, C].
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


def public_means(ours: Tensor, images: Tensor) -> Tensor:
    """The mean of the public images [n, …] that the server puts into each class, [C, …]; of all where it puts none."""
    best = ours.argmax(1)
    picked = [images[best == label] for label in range(ours.shape[1])]
    return torch.stack([(own if len(own) else images).mean(0) for own in picked])


def _logs(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.cat([ours, theirs], dim=1).clamp_min(LEAST).log().float()
