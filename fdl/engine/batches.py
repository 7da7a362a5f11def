"""Shuffled batches for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.modules.types import Batch
    from fdl.recipe.config import Fit

AT_ONCE = 1 << 18
"""Bytes up to which several batches are gathered at once: for small ones the overhead of a call dominates."""


def batches(
    count: int, config: Fit, generator: torch.Generator, skip_single: bool = False
) -> Iterator[tuple[bool, Tensor]]:
    """Draw shuffled batches for the configured epochs or steps.

    Args:
        count: number of samples.
        config: its `epochs` or `steps`, and `batch_size`, are used.
        generator: random stream of the shuffles.
        skip_single: skip batches of one sample, with which batch normalisation cannot train.

    Yields:
        True if the batch ends an epoch, and its indices, int64 [≤ batch_size].
    """
    left = config.steps if config.steps is not None else -1
    epochs = config.epochs if config.steps is None else -1
    while left != 0 and epochs != 0:
        order = torch.randperm(count, generator=generator)
        order = order.split(config.batch_size) if count > config.batch_size else (order,)
        if skip_single and len(order[-1]) == 1:
            order = order[:-1]
        if not order:
            return
        for position, indices in enumerate(order):
            yield position == len(order) - 1, indices
            left -= 1
            if left == 0:
                return
        epochs -= 1


def gathered(
    samples: Samples, drawn: Iterable[tuple[bool, Tensor]], generator: torch.Generator
) -> Iterator[tuple[bool, Tensor, Batch]]:
    """Gather the samples of batches.

    Shuffles and augmentations alternate in drawing from the generator, as in a plain loop; if only shuffles draw,
    several batches are gathered at once.

    Args:
        samples: the samples to select from.
        drawn: the result of `batches`.
        generator: random stream of the augmentations.

    Yields:
        True if the batch ends an epoch, its indices, and the batch.
    """
    if not samples.at_once:
        for ended, indices in drawn:
            yield ended, indices, samples.batch(indices, generator)
        return
    room = AT_ONCE * len(samples) // max(samples.nbytes, 1)  # samples in one piece
    drawn, some, count = iter(drawn), [], 0
    while True:
        item = next(drawn, None)
        if some and (item is None or count + len(item[1]) > room):
            order = some[0][1] if len(some) == 1 else torch.cat([indices for _, indices in some])
            yield from _cut(samples.batch(order, generator), some)
            some, count = [], 0
        if item is None:
            return
        some.append(item)
        count += len(item[1])


def _cut(whole: Batch, some: list[tuple[bool, Tensor]]) -> Iterator[tuple[bool, Tensor, Batch]]:
    """Split a large batch into consecutive small ones."""
    if len(some) == 1:
        yield *some[0], whole
        return
    sizes = [len(indices) for _, indices in some]
    parts = [[None] * len(sizes) if part is None else part.split(sizes) for part in whole]
    for item, *batch in zip(some, *parts):
        yield *item, tuple(batch)
