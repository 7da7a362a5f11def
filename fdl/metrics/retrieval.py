"""How well images find their captions, and captions their images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdl.modules.dual_encoder import scale_of

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.metrics.predictor import Predictor

_CELLS = 1 << 20
"""Similarities that exist at once, 4 MB of float32: some queries with all N candidates, never all N × N."""

_ROWS = 512
"""Captions read at a time."""

_TIE = 1e-6
"""Cosines that differ by less are equal: that is rounding of float32, which depends on a vector's place in a batch."""


def image_text(
    predictor: Predictor, module: LightningModule, samples: Samples, names: Sequence[str]
) -> dict[str, float]:
    """Measure a dual encoder on image–text pairs, every image against every caption of the set.

    Args:
        predictor: whose runtime answers.
        module: gives unit vectors by ``encode_image(images)`` and ``encode_text(tokens)``, and a ``logit_scale``.
        samples: n pairs (images, tokens).
        names: of the metrics: ``image_to_text_recall_at_<k>`` and ``text_to_image_recall_at_<k>``, as in `recall`;
            ``mean_recall``, the mean of both ways at 1, 5 and 10; ``contrastive_loss``, as in `contrastive_loss`.
            Pairs with the same caption count as one another's match.

    Returns:
        One number a name, in the order asked; ``nan`` for each where there are no pairs.
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
        values["contrastive_loss"] = contrastive_loss(images, texts, scale_of(module))
    return {name: values[name] for name in names}


def embed(predictor: Predictor, module: LightningModule, samples: Samples) -> tuple[Tensor, Tensor]:
    """The unit vectors of n pairs: images float32 [n, D] and texts [n, D], on the CPU."""
    both = predictor.predict(module, samples, _both)
    return both[:, 0], both[:, 1]


def captions(samples: Samples) -> Tensor:
    """Number the captions: int64 [n], equal for pairs whose captions have the same tokens."""
    seen: dict[bytes, int] = {}
    numbers = []
    for rows in torch.arange(len(samples)).split(_ROWS):
        for row in samples.batch(rows)[0][1]:
            numbers.append(seen.setdefault(row[row >= 0].numpy().tobytes(), len(seen)))
    return torch.tensor(numbers, dtype=torch.int64)


def match_ranks(queries: Tensor, candidates: Tensor, groups: Tensor | None = None) -> Tensor:
    """Find how far down each query's first match comes.

    Equal similarities are ordered against the model: a model that gives all candidates the same vector finds nothing.

    Args:
        queries: unit vectors [n, D].
        candidates: unit vectors [n, D]; the i-th belongs to the i-th query.
        groups: [n]; every candidate of the query's group is a match too. None: only its own.

    Returns:
        int64 [n]: 1 + the number of candidates that are no match and at least as similar as the best match.

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
        # a comparison with NaN is false: written so that a diverged model comes last, not first
        ranks[rows] = 1 + (~(match | (similar < best - _TIE))).sum(1)
    return ranks


def recall(ranks: Tensor, k: int) -> float:
    """Recall@k: share of the queries with a match among the first k candidates; `ranks` as from `match_ranks`.

    Example:
        >>> import torch
        >>> recall(torch.tensor([1, 2, 9, 1]), k=1)
        0.5
    """
    return float((ranks <= k).double().mean())


def contrastive_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    """Symmetric cross entropy of each pair among all n pairs of the set (Radford et al., 2021), in nats.

    Chance is log n. Unlike in training, it does not depend on a batch size.

    Args:
        images: unit vectors [n, D].
        texts: unit vectors [n, D].
        scale: what cosines are multiplied with.

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
    """Positions of queries that are compared at once."""
    return torch.arange(count).split(max(1, _CELLS // max(count, 1)))


def _both(module: LightningModule, inputs: tuple[Tensor, Tensor]) -> Tensor:
    images, tokens = inputs
    return torch.stack([module.encode_image(images), module.encode_text(tokens)], dim=1)
