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
    """Stack batches of K clients, [K, …].

    Args:
        batches: batches of the same structure. Texts may differ in width. Inputs [b, …] may differ in b if the second
            element of each batch is labels [b]: shorter ones are padded with copies of their first row, labelled
            `IGNORED_LABEL`.

    Raises:
        RuntimeError: shapes of tensors differ in any other way.
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
        # padded labels are ignored by the loss
        whole = torch.cat([*parts, parts[0].new_full((1,), IGNORED_LABEL)] if labels else list(parts))
        rows = (labelled if labels else filled).to(whole.device)
        return whole.index_select(0, rows).unflatten(0, (len(sizes), -1))

    return tuple([column(parts, labels=i == 1) for i, parts in enumerate(zip(*batches))])


@lru_cache(maxsize=256)
def _rows(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the rows of concatenated inputs, and of labels followed by one padding row, for equally long batches."""
    ends = torch.tensor(sizes).cumsum(0)
    starts = ends - torch.tensor(sizes)
    place = torch.arange(max(sizes)).expand(len(sizes), -1)
    there = place < torch.tensor(sizes)[:, None]
    # padding repeats a valid row, so that the model computes finite values
    filled = torch.where(there, starts[:, None] + place, starts[:, None])
    return filled.flatten(), torch.where(there, filled, ends[-1]).flatten()
