"""Temperature scaling: calibrate a specialist's probabilities without changing its most likely classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LIMITS = (0.01, 100.0)
"""Bounds of a fitted temperature."""

PRIOR = 1.0
"""Weight of the belief that a specialist needs no calibration, against one held-out sample."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature that makes held-out labels likeliest: ``argmin_T Σ CE(z / T, y) + log²(T) / 2``.

    Dividing logits by it leaves the most likely class as it is. The second term is a weak prior: a handful of held-out
    samples that are all answered rightly would else ask for T = 0. Source: Guo et al., "On
    Calibration of Modern Neural Networks" (the prior and the bounds are ours).

    Args:
        logits: [n, C] of samples that the model was not trained on.
        labels: int64 [n].

    Returns:
        T within `LIMITS`; 1 where there are no samples.

    Raises:
        ValueError: the lengths disagree.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)} do not fit labels {list(labels.shape)}")
    if len(labels) == 0:
        return 1.0
    logits, labels = logits.detach().double().cpu(), labels.cpu()
    # β = log(1/T) keeps T positive, and the first step, which L-BFGS takes at most 1 long, within a factor of e
    beta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([beta], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * beta.exp(), labels, reduction="sum") + PRIOR * beta.square() / 2
        loss = loss / len(labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    temperature = math.exp(-beta.item())
    if not math.isfinite(temperature):
        return 1.0
    return min(max(temperature, LIMITS[0]), LIMITS[1])
