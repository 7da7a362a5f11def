"""Contrastive losses between images and texts, as pure functions of unit vectors or of logits.

Conventions, the same in every function here: rows are pairs, so that row i of the images belongs to row i of the
texts; ``logits[i, j]`` is the scaled cosine of image i and text j; a loss is averaged over rows and over both
directions, image to text and text to image; 16-bit inputs are computed in float32.

The loss of a pair depends on the other pairs of its batch, so losses and teachers must be compared on equal batches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl.losses.responses import upcast

MAX_SCALE = 100.0
"""Largest factor between cosines and logits, as in CLIP: larger ones make training unstable."""


def logits_between(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Compute the scaled cosines between all images and all texts.

    Args:
        images: unit vectors ``[n, D]``.
        texts: unit vectors ``[m, D]``.
        scale: factor by which cosines are multiplied, > 0.

    Returns:
        ``[n, m]``, float32 for 16-bit inputs.

    Example:
        >>> import torch
        >>> logits_between(torch.eye(2), torch.eye(2), 10.0)
        tensor([[10.,  0.],
                [ 0., 10.]])
    """
    # autocast would compute cosines with 8 bits, an error of a fifth of a unit at a scale of 100
    with torch.autocast(images.device.type, enabled=False):
        return scale * (upcast(images) @ upcast(texts).T)


def info_nce(logits: Tensor) -> Tensor:
    """Compute the symmetric contrastive loss: the cross entropy of every row and column against the matching pair.

    It is log n if all logits are equal. Pairs with identical texts do not repel each other: their gradients add up to
    that of one shared target, though the loss stays above 0. Source: Radford et al., "Learning Transferable Visual
    Models From Natural Language Supervision" (CLIP), figure 3.

    Args:
        logits: ``[n, n]``, matching pairs on the diagonal.

    Example:
        >>> import torch
        >>> info_nce(torch.zeros(4, 4))  # all logits are equal: log 4
        tensor(1.3863)
    """
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(upcast(logits), own) + F.cross_entropy(upcast(logits).T, own)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Compute the binary loss of all combinations of image and text: ``-Σ_ij log σ(±z_ij) / n``.

    The sign is + for matching pairs and - for all others. Source: Zhai et al., "Sigmoid Loss for Language Image
    Pre-Training" (SigLIP), equation 1, whose logits have a bias.

    Args:
        logits: ``[n, n]``, matching pairs on the diagonal, with the bias added.
    """
    logits = upcast(logits)
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def gathered_info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Compute this rank's part of `info_nce` over the batches of all ranks; its mean over ranks is the full loss.

    Gradients flow back to every rank's vectors, and DDP's mean of gradients over ranks equals that of the full batch,
    up to rounding. Only for one model that all ranks train jointly, not if ranks train different clients. All ranks
    need the same number of rows.

    Args:
        images: this rank's unit vectors ``[n, D]``.
        texts: this rank's unit vectors ``[n, D]``.
        scale: factor by which cosines are multiplied, > 0.
    """
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    all_images, all_texts = (torch.cat(all_gather(side.contiguous())) for side in (images, texts))
    own = dist.get_rank() * len(images) + torch.arange(len(images), device=images.device)
    to_texts, to_images = logits_between(images, all_texts, scale), logits_between(texts, all_images, scale)
    return (F.cross_entropy(to_texts, own) + F.cross_entropy(to_images, own)) / 2


def affinities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the affinities of a batch: each image's distribution over texts, and each text's over images.

    Args:
        logits: scaled cosines ``[n, m]``.

    Returns:
        Image to text ``[n, m]`` and text to image ``[m, n]``, rows sum to 1.

    Example:
        >>> import torch
        >>> to_texts, to_images = affinities(torch.zeros(2, 2))
        >>> to_texts
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    return torch.softmax(upcast(logits), dim=1), torch.softmax(upcast(logits).T, dim=1)


def affinity_distillation(logits: Tensor, to_texts: Tensor, to_images: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the KL divergence from a teacher's affinities to the student's, mean over rows and both directions.

    It is 0, with zero gradient, if they agree. Teacher and student may have embeddings of different widths, and each
    has its own scale. Sources: Wu et al., "TinyCLIP" (affinity mimicking, there as a cross entropy, which has the same
    gradient); Yang et al., "CLIP-KD" (contrastive relational distillation).

    Args:
        logits: the student's logits ``[n, n]``.
        to_texts: the teacher's affinities from image to text, ``[n, n]``, as returned by `affinities`.
        to_images: the teacher's affinities from text to image, ``[n, n]``.
        weights: weight of each pair, ``[n]``, ≥ 0; None: equal weights. The loss is 0 if all weights are 0.
    """
    logits = upcast(logits)
    rows = [
        F.kl_div(torch.log_softmax(side, dim=1), target, reduction="none").sum(1)
        for side, target in ((logits, to_texts), (logits.T, to_images))
    ]
    each = (rows[0] + rows[1]) / 2
    if weights is None:
        return each.mean()
    weights = weights.to(each.dtype)
    return (weights * each).sum() / weights.sum().clamp_min(torch.finfo(each.dtype).tiny)


def interactive_info_nce(
    images: Tensor, texts: Tensor, teacher_images: Tensor, teacher_texts: Tensor, scale: Tensor | float
) -> Tensor:
    """Compute the contrastive loss of the student's images with the teacher's texts, and vice versa.

    Source: Yang et al., "CLIP-KD" (interactive contrastive learning), with one scale for both terms.

    Args:
        images: the student's unit vectors of images, ``[n, D]``, in the teacher's space.
        texts: the student's unit vectors of texts, ``[n, D]``, in the teacher's space.
        teacher_images: the teacher's unit vectors of images, ``[n, D]``.
        teacher_texts: the teacher's unit vectors of texts, ``[n, D]``.
        scale: factor by which cosines are multiplied, > 0.
    """
    own = torch.arange(len(images), device=images.device)
    to_texts, to_images = logits_between(images, teacher_texts, scale), logits_between(texts, teacher_images, scale)
    return (F.cross_entropy(to_texts, own) + F.cross_entropy(to_images, own)) / 2


def clamp_scale(log_scale: Tensor) -> None:
    """Clamp a learned log-scale to [0, log `MAX_SCALE`], in place; CLIP does so after every step.

    Args:
        log_scale: scalar, changed in place.

    Example:
        >>> import torch
        >>> log_scale = torch.tensor(9.0)
        >>> clamp_scale(log_scale)
        >>> log_scale.exp().round()
        tensor(100.)
    """
    with torch.no_grad():
        log_scale.clamp_(0.0, math.log(MAX_SCALE))
