"""Image–text retrieval metrics of dual encoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdl.modules.dual_encoder import logit_scale_of

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.metrics.predictor import Predictor

_CELLS = 1 << 20
"""Number of similarities in memory at a time (4 MB of float32): a block of queries with all N candidates."""

_ROWS = 512
"""Number of captions read at a time."""

_TIE = 1e-6
"""Cosines that differ by less count as equal: float32 rounding depends on a vector's position in the batch."""


def image_text(
    predictor: Predictor, module: LightningModule, samples: Samples, names: Sequence[str]
) -> dict[str, float]:
    """Compute retrieval metrics of a dual encoder, comparing every image with every caption of the set.

    Args:
        predictor: the participant that runs the model.
        module: the dual encoder, with ``encode_image(images)`` and ``encode_text(tokens)`` that return unit vectors,
            and a ``logit_scale``.
        samples: n pairs (images, tokens).
        names: the metrics to compute: ``image_to_text_recall_at_<k>`` and ``text_to_image_recall_at_<k>`` (see
            `recall`); ``mean_recall``, the mean over both directions at k = 1, 5 and 10; ``contrastive_loss`` (see
            `contrastive_loss`). Pairs with identical captions match each other.

    Returns:
        One number per name, in the given order; ``nan`` if there are no pairs.
    """
    if not len(samples):
        return dict.fromkeys(names, math.nan)
    images, texts = embed(predictor, module, samples)
    values: dict[str, float] = {}
    if any("recall" in name for name in names):
        groups = captions(samples)
        ranks = {
            "image_to_text": match_ranks(images, texts, groups),
            "text_to_image": match_ranks(texts, images, groups),
        }
        cuts = {int(name.rpartition("_")[2]) for name in names if "_recall_at_" in name} | {1, 5, 10}
        for way, found in ranks.items():
            values.update({f"{way}_recall_at_{k}": recall(found, k) for k in cuts})
        values["mean_recall"] = sum(values[f"{way}_recall_at_{k}"] for way in ranks for k in (1, 5, 10)) / 6
    if "contrastive_loss" in names:
        values["contrastive_loss"] = contrastive_loss(images, texts, logit_scale_of(module))
    return {name: values[name] for name in names}


def embed(predictor: Predictor, module: LightningModule, samples: Samples) -> tuple[Tensor, Tensor]:
    """Embed n image–text pairs.

    Args:
        predictor: the participant that runs the model.
        module: the dual encoder.
        samples: n pairs (images, tokens).

    Returns:
        Unit vectors of the images and of the texts, both float32 [n, D] on the CPU.
    """
    both = predictor.predict(module, samples, _both)
    return both[:, 0], both[:, 1]


def captions(samples: Samples) -> Tensor:
    """Number the distinct captions.

    Args:
        samples: n pairs (images, tokens).

    Returns:
        int64 [n]; pairs whose captions have the same tokens have the same number.
    """
    seen: dict[bytes, int] = {}
    numbers = []
    for rows in torch.arange(len(samples)).split(_ROWS):
        for row in samples.batch(rows)[0][1]:
            numbers.append(seen.setdefault(row[row >= 0].numpy().tobytes(), len(seen)))
    return torch.tensor(numbers, dtype=torch.int64)


def match_ranks(queries: Tensor, candidates: Tensor, groups: Tensor | None = None) -> Tensor:
    """Compute the rank of each query's first match.

    Ties are resolved against the model: one that maps all candidates to the same vector retrieves nothing.

    Args:
        queries: unit vectors [n, D].
        candidates: unit vectors [n, D]; the i-th belongs to the i-th query.
        groups: [n]; every candidate of the query's group is a match. None: only the query's own candidate is.

    Returns:
        int64 [n]: 1 + the number of non-matching candidates that are at least as similar as the best match.

    Example:
        >>> import torch
        >>> queries = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> match_ranks(queries, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([1, 2])
    """
    groups = torch.arange(len(queries)) if groups is None else groups
    ranks = torch.empty(len(queries), dtype=torch.int64)
    for rows in _parts(len(queries)):
        similar = queries[rows] @ candidates.T
        match = groups[rows, None] == groups
        best = similar.masked_fill(~match, -math.inf).amax(1, keepdim=True)
        # comparisons with NaN are false; negated like this, a diverged model ranks last, not first
        ranks[rows] = 1 + (~(match | (similar < best - _TIE))).sum(1)
    return ranks


def recall(ranks: Tensor, k: int) -> float:
    """Compute recall@k: the fraction of queries with a match among the first k candidates.

    Args:
        ranks: rank of each query's first match, int64 [n], from `match_ranks`.
        k: number of candidates retrieved.

    Example:
        >>> import torch
        >>> recall(torch.tensor([1, 2, 9, 1]), k=1)
        0.5
    """
    return float((ranks <= k).double().mean())


def contrastive_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    """Compute the symmetric contrastive loss of each pair among all n pairs (Radford et al., 2021), in nats.

    Chance level is log n. Unlike the training loss, it does not depend on a batch size.

    Args:
        images: unit vectors [n, D].
        texts: unit vectors [n, D].
        scale: factor of the cosines (inverse temperature).

    Example:
        >>> import torch
        >>> print(f"{contrastive_loss(torch.ones(2, 1), torch.ones(2, 1), scale=10.0):.4f}")  # chance, log 2
        0.6931
    """
    total = 0.0
    for queries, candidates in ((images, texts), (texts, images)):
        for rows in _parts(len(queries)):
            logits = scale * (queries[rows] @ candidates.T)
            total += float(torch.nn.functional.cross_entropy(logits, rows, reduction="sum"))
    return total / (2 * len(images))


def _parts(count: int) -> tuple[Tensor, ...]:
    """Split query positions into blocks that are compared at a time."""
    return torch.arange(count).split(max(1, _CELLS // max(count, 1)))


def _both(module: LightningModule, inputs: tuple[Tensor, Tensor]) -> Tensor:
    images, tokens = inputs
    return torch.stack([module.encode_image(images), module.encode_text(tokens)], dim=1)
