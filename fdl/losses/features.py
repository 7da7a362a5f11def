"""Losses between intermediate activations of student and teacher, with the conventions of `fdl.losses.responses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl.losses.responses import upcast


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared difference of features, mean over rows *and* dimensions.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets"; the student's features pass through a projector first.

    Args:
        student: features ``[n, d]``.
        teacher: features ``[n, d]``.

    Example:
        >>> import torch
        >>> feature_mse(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)
    """
    return F.mse_loss(upcast(student), upcast(teacher))


def feature_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the smooth L1 distance to the teacher's features, normalised to mean 0 and deviation 1 per row.

    Source: Baevski et al., "data2vec": targets are normalised, predictions are not. Mean over rows and dimensions.

    Args:
        student: features ``[n, d]``.
        teacher: features ``[n, d]``.
    """
    teacher = upcast(teacher)
    return F.smooth_l1_loss(upcast(student), F.layer_norm(teacher, teacher.shape[-1:]))


def feature_normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared difference of normalised rows, mean over rows *and* dimensions: ``2 (1 - cos) / d``.

    Source: CLIP-KD's feature distillation, which weights it with 2000, because the mean over d makes it small.

    Args:
        student: features ``[n, d]``.
        teacher: features ``[n, d]``.

    Example:
        >>> import torch
        >>> feature_normalized_mse(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 7.0]]))  # lengths do not matter
        tensor(1.)
    """
    return F.mse_loss(F.normalize(upcast(student), dim=-1), F.normalize(upcast(teacher), dim=-1))


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute ``1 - cos`` between the rows of student and teacher, mean over rows.

    Args:
        student: features ``[n, d]``.
        teacher: features ``[n, d]``.

    Example:
        >>> import torch
        >>> feature_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)
    """
    return (1 - F.cosine_similarity(upcast(student), upcast(teacher), dim=-1)).mean()


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the pairwise distances between the rows of a batch; the two sides may have different widths.

    Distances are divided by their mean, and compared by the Huber loss, mean over ordered pairs of different rows. The
    loss is invariant to rotation, translation and scaling of either side. Source: Park et al., "Relational Knowledge
    Distillation" (RKD-D).

    Args:
        student: features ``[n, d]``, n ≥ 2; the loss is 0 for fewer rows.
        teacher: features ``[n, e]``.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[0.0], [1.0], [3.0]])
        >>> bool(relational_distance(rows, 10 * rows + 5) < 1e-6)  # moved and scaled: the same relations
        True
    """
    if len(student) < 2:
        return student.sum() * 0.0
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the angles between the rows of a batch; the two sides may have different widths.

    The cosines of the angles at row j between rows i and k are compared by the Huber loss, mean over triples of
    different rows; memory grows as n³. Source: Park et al., "Relational Knowledge Distillation" (RKD-A).

    Args:
        student: features ``[n, d]``, n ≥ 3; the loss is 0 for fewer rows.
        teacher: features ``[n, e]``.
    """
    count = len(student)
    if count < 3:
        return student.sum() * 0.0
    other = ~torch.eye(count, dtype=torch.bool, device=student.device)
    triples = other.unsqueeze(2) & other.unsqueeze(1) & other.unsqueeze(0)
    return F.smooth_l1_loss(_cosines_of_angles(student)[triples], _cosines_of_angles(teacher)[triples])


def relational(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare distances and angles, with twice the weight for angles (RKD-DA's proportion).

    Args:
        student: features ``[n, d]``, n ≥ 3.
        teacher: features ``[n, e]``.
    """
    return relational_distance(student, teacher) + 2 * relational_angle(student, teacher)


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute one minus the linear centred kernel alignment of the rows of a batch; widths may differ.

    ``1 - ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`` with centred columns, in [0, 1]; 1 if one side is constant. It is invariant to
    rotation, translation and scaling of either side. Source: Kornblith et al., "Similarity of Neural Network
    Representations Revisited".

    Args:
        student: X, features ``[n, d]``, n ≥ 2.
        teacher: Y, features ``[n, e]``.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
        >>> bool(linear_cka(rows, 3 * rows) < 1e-6)
        True
        >>> linear_cka(rows, rows.flip(0))
        tensor(0.8276)
    """
    x, y = (upcast(side) - upcast(side).mean(0) for side in (student, teacher))
    # Gram matrices of rows: a batch has fewer rows than features
    k, m = x @ x.T, y @ y.T
    scale = k.norm() * m.norm()
    return 1 - (k * m).sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _relative_distances(rows: Tensor) -> Tensor:
    """Return the distances of all pairs of different rows, divided by their mean, [n (n - 1) / 2]."""
    distances = F.pdist(upcast(rows))
    return distances / distances.mean().clamp_min(torch.finfo(distances.dtype).tiny)


def _cosines_of_angles(rows: Tensor) -> Tensor:
    """Return ``[n, n, n]``, whose entry (j, i, k) is the cosine of the angle at j between i and k."""
    edges = upcast(rows).unsqueeze(0) - upcast(rows).unsqueeze(1)
    edges = F.normalize(edges, dim=-1)
    return edges @ edges.transpose(1, 2)


@dataclass(frozen=True)
class FeatureLoss:
    """Loss between features of a student and of a teacher.

    Args:
        function: function of the student's and the teacher's features, ``[n, d]`` each.
        projected: True if both need to be in the same space, so that the student's features pass through a projector.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    projected: bool

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student: features ``[n, d]``.
            teacher: features ``[n, d]``, or ``[n, e]`` without a projector.
        """
        return self.function(student, teacher)


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "mse": FeatureLoss(feature_mse, projected=True),
    "smooth_l1": FeatureLoss(feature_smooth_l1, projected=True),
    "normalized_mse": FeatureLoss(feature_normalized_mse, projected=True),
    "cosine": FeatureLoss(feature_cosine, projected=True),
    "distance": FeatureLoss(relational_distance, projected=False),
    "angle": FeatureLoss(relational_angle, projected=False),
    "relational": FeatureLoss(relational, projected=False),
    "cka": FeatureLoss(linear_cka, projected=False),
}
"""Feature losses by their name in a recipe."""
