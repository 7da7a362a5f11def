"""Losses between a student's embeddings and class prototypes, with the conventions of `fdl.losses.responses`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl.losses.responses import soft_cross_entropy, upcast


def prototype_mse(student: Tensor, prototypes: Tensor, assignment: Tensor) -> Tensor:
    """Compute the squared distance to the assigned prototypes, mean over rows *and* dimensions.

    ``Σ_j a_j ‖h - c_j‖² / d``. Source: Tan et al., "FedProto", with soft assignments instead of classes.

    Args:
        student: embeddings h, ``[n, d]``.
        prototypes: c, ``[m, d]``.
        assignment: a, ``[n, m]``, soft assignment of each row to the prototypes; rows sum to 1.

    Example:
        >>> import torch
        >>> prototypes = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
        >>> prototype_mse(torch.tensor([[2.0, 0.0]]), prototypes, torch.tensor([[1.0, 0.0]]))  # (2² + 0²) / 2
        tensor(2.)
    """
    distances = torch.cdist(upcast(student), upcast(prototypes), compute_mode="donot_use_mm_for_euclid_dist").square()
    return (assignment * distances).sum(1).mean() / student.shape[1]


def prototype_infonce(student: Tensor, prototypes: Tensor, assignment: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the contrastive loss of the assigned prototypes against all others, mean over rows.

    ``-Σ_j a_j log (exp(h·c_j / t) / Σ_k exp(h·c_k / t))`` with normalised rows and prototypes; log m if all m
    prototypes are equal. Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding".

    Args:
        student: embeddings h, ``[n, d]``.
        prototypes: c, ``[m, d]``.
        assignment: a, ``[n, m]``, soft assignment of each row to the prototypes; rows sum to 1.
        temperature: t > 0.

    Example:
        >>> import torch
        >>> prototype_infonce(torch.tensor([[1.0, 0.0]]), torch.ones(2, 2), torch.tensor([[1.0, 0.0]]))  # log 2
        tensor(0.6931)
    """
    similarity = F.normalize(upcast(student), dim=-1) @ F.normalize(upcast(prototypes), dim=-1).T
    return soft_cross_entropy(similarity / temperature, assignment)


PROTOTYPE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": prototype_mse,
    "infonce": prototype_infonce,
}
"""Prototype losses by their name in a recipe."""
