"""Batches of several clients, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fdl.modules.objectives import IGNORED_LABEL


def stacked(batches: Sequence[tuple]) -> tuple:
    """Batches of K clients as one, [K, …].

    Args:
        batches: of one form. Texts may differ in width. Inputs [b, …] may differ in b where the second element of each
            is labels [b]: shorter ones are filled up with copies of their first row, labelled `IGNORED_LABEL`.

    Raises:
        RuntimeError: for tensors whose shapes differ in any other way.
    """
    sizes = tuple([len(batch[1]) if isinstance(batch[1], Tensor) else 0 for batch in batches])
    short = min(sizes) < max(sizes)
    filled, labelled = _rows(sizes) if short else (None, None)

    def column(parts: Sequence[Any], labels: bool = False) -> Any:
        if parts[0] is None:
            return None
        if isinstance(parts[0], tuple):
            return tuple(column(some) for some in zip(*parts))
        if not parts[0].is_floating_point() and parts[0].ndim == 2:
            width = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
        if not short:
            return torch.stack(parts)
        # labels that fill up count for nothing
        whole = torch.cat([*parts, parts[0].new_full((1,), IGNORED_LABEL)] if labels else list(parts))
        rows = (labelled if labels else filled).to(whole.device)
        return whole.index_select(0, rows).unflatten(0, (len(sizes), -1))

    return tuple([column(parts, labels=i == 1) for i, parts in enumerate(zip(*batches))])


@lru_cache(maxsize=256)
def _rows(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which rows of all inputs on end, and of all labels with one more behind them, make batches of one size."""
    ends = torch.tensor(sizes).cumsum(0)
    starts = ends - torch.tensor(sizes)
    place = torch.arange(max(sizes)).expand(len(sizes), -1)
    there = place < torch.tensor(sizes)[:, None]
    # in the place of what is not there stands a row that the model knows to handle
    filled = torch.where(there, starts[:, None] + place, starts[:, None])
    return filled.flatten(), torch.where(there, filled, ends[-1]).flatten()
