"""Batches of different sizes in one tensor: rows that are there for their shape only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = -100
"""Label of a row that counts for nothing: what torch's cross entropy ignores."""

Step = TypeVar("Step", bound=Callable)


def ignores_padding(step: Step) -> Step:
    """Mark a training step: samples with the label `PADDING` count for nothing in any loss that it returns."""
    step.ignores_padding = True
    return step


def stacked(batches: Sequence[tuple]) -> tuple:
    """Batches of K clients as one, [K, …].

    Args:
        batches: of one form. Texts may differ in width. Inputs [b, …] may differ in b where the second element of each
            is labels [b]: shorter ones are filled up with copies of their first row, labelled `PADDING`.

    Raises:
        RuntimeError: for tensors whose shapes differ in any other way.
    """
    sizes = [len(batch[1]) if isinstance(batch[1], Tensor) else 0 for batch in batches]
    longest = max(sizes)
    short = [(i, size) for i, size in enumerate(sizes) if size < longest]

    def column(parts: Sequence, labels: bool = False):
        if parts[0] is None:
            return None
        if isinstance(parts[0], tuple):
            return tuple(column(some) for some in zip(*parts))
        if not parts[0].is_floating_point() and parts[0].ndim == 2:
            width = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
        parts = list(parts)
        for i, size in short:
            # what fills up is labelled to count for nothing, or else a row that the model knows to handle
            fill = parts[i].new_tensor(PADDING) if labels else parts[i][0]
            parts[i] = torch.cat([parts[i], fill.expand(longest - size, *parts[i].shape[1:])])
        return torch.stack(parts)

    return tuple(column(parts, labels=i == 1) for i, parts in enumerate(zip(*batches)))
