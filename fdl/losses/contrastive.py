"""Losses between images and texts, as pure functions of unit vectors and of the logits between them.

Conventions, the same in every function here: rows are pairs, so that row i of the images belongs to row i of the
texts; ``logits[i, j]`` is the scaled cosine of image i and text j; a loss is averaged over rows and over both
directions, images that look for their text and texts that look for their image; 16-bit inputs are computed in float32.

A loss over a batch depends on who else is in it. Comparing losses, or teachers, takes the same batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCALE = 100.0
"""Largest factor between cosines and logits, as in CLIP: more makes training unstable."""


def logits_between(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled cosines of all images and texts.

    Args:
        images: unit vectors ``[n, D]``.
        texts: unit vectors ``[m, D]``.
        scale: factor > 0.

    Returns:
        ``[n, m]``, float32 for 16-bit inputs.

    Example:
        >>> import torch
        >>> logits_between(torch.eye(2), torch.eye(2), 10.0)
        tensor([[10.,  0.],
                [ 0., 10.]])
    """
    # autocast would give cosines of 8 bits, which at a scale of 100 is wrong by a fifth of a unit
    with torch.autocast(images.device.type, enabled=False):
        return scale * (_wide(images) @ _wide(texts).T)


def info_nce(logits: Tensor) -> Tensor:
    """Symmetric contrastive loss: every row's and every column's cross entropy against its own pair.

    log n where all logits are equal. Pairs whose texts are the same push apart nothing: their gradients add up to
    that of one shared target, though the loss stays above 0. Source: Radford et al., "Learning Transferable Visual
    Models From Natural Language Supervision" (CLIP), figure 3.

    Args:
        logits: ``[n, n]``, own pairs on the diagonal.

    Example:
        >>> import torch
        >>> info_nce(torch.zeros(4, 4))  # nothing is told apart: log 4
        tensor(1.3863)
    """
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(_wide(logits), own) + F.cross_entropy(_wide(logits).T, own)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Every image and text by itself: do they belong together? ``-Σ_ij log σ(±z_ij) / n``.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (SigLIP), equation 1, whose logits have a bias.

    Args:
        logits: ``[n, n]``, own pairs on the diagonal, with the bias added.
    """
    logits = _wide(logits)
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def gathered_info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """This rank's share of `info_nce` over the batches of all ranks: their mean over ranks is the loss of the whole.

    Gradients flow back to every rank's vectors, and DDP's mean of gradients over ranks is that of the whole batch, to
    rounding. Only for one model that all ranks train together: never where ranks train different clients. All ranks
    need equally many rows.

    Args:
        images: this rank's unit vectors ``[n, D]``.
        texts: this rank's unit vectors ``[n, D]``.
        scale: factor > 0.
    """
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    all_images, all_texts = (torch.cat(all_gather(side.contiguous())) for side in (images, texts))
    own = dist.get_rank() * len(images) + torch.arange(len(images), device=images.device)
    to_texts, to_images = logits_between(images, all_texts, scale), logits_between(texts, all_images, scale)
    return (F.cross_entropy(to_texts, own) + F.cross_entropy(to_images, own)) / 2


def affinities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch looks like to a model: for each image the texts' probabilities, for each text the images'.

    Args:
        logits: ``[n, m]``.

    Returns:
        Image to text ``[n, m]`` and text to image ``[m, n]``, rows sum to 1.

    Example:
        >>> import torch
        >>> to_texts, to_images = affinities(torch.zeros(2, 2))
        >>> to_texts
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    return torch.softmax(_wide(logits), dim=1), torch.softmax(_wide(logits).T, dim=1)


def affinity_distillation(logits: Tensor, to_texts: Tensor, to_images: Tensor, weights: Tensor | None = None) -> Tensor:
    """KL from a teacher's affinities to the student's, mean over rows and both directions.

    0, and without gradient, where they agree. Widths of embeddings do not enter, so teacher and student may have any.
    Sources: Wu et al., "TinyCLIP" (affinity mimicking, there as a cross entropy, which has the same gradient); Yang et
    al., "CLIP-KD" (contrastive relational distillation). Each side has its own scale.

    Args:
        logits: the student's ``[n, n]``.
        to_texts: the teacher's, ``[n, n]``, image to text, as `affinities` gives them.
        to_images: ``[n, n]``, text to image.
        weights: ``[n]``, ≥ 0, how much each pair counts; None counts all alike. 0 for a loss without any weight.
    """
    logits = _wide(logits)
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
    """The student's images look for the teacher's texts, and its texts for the teacher's images.

    Source: Yang et al., "CLIP-KD" (interactive contrastive learning), with one scale for both terms.

    Args:
        images: the student's unit vectors ``[n, D]``, in the teacher's space.
        texts: likewise.
        teacher_images: unit vectors ``[n, D]``.
        teacher_texts: likewise.
        scale: factor > 0.
    """
    own = torch.arange(len(images), device=images.device)
    to_texts, to_images = logits_between(images, teacher_texts, scale), logits_between(texts, teacher_images, scale)
    return (F.cross_entropy(to_texts, own) + F.cross_entropy(to_images, own)) / 2


def clamp_scale(log_scale: Tensor) -> None:
    """Bring a learnt log-scale back to [0, log `MAX_SCALE`], in place; CLIP does so after every step.

    Example:
        >>> import torch
        >>> log_scale = torch.tensor(9.0)
        >>> clamp_scale(log_scale)
        >>> log_scale.exp().round()
        tensor(100.)
    """
    with torch.no_grad():
        log_scale.clamp_(0.0, math.log(MAX_SCALE))


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
