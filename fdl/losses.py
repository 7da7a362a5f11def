"""Distillation and regularisation losses as pure functions of tensors.

Conventions, the same in every function here:

- the student gives *logits* ``[n, C]``; the teacher gives *probabilities* ``[n, C]`` (rows that sum to 1, zeros
  allowed, e.g. one-hot votes), because probabilities are what an aggregate of responses holds. Mean logits become
  probabilities by ``softmax`` once. Only `mse_logits`, `mae_logits` and `distillation` take a teacher's logits;
- a temperature T softens both sides: the student by ``softmax(z / T)``, the teacher by `soften`, which for
  ``p = softmax(z)`` is the same thing;
- a loss is summed over the classes and averaged over the n rows ("batchmean");
- 16-bit inputs are computed in float32;
- nothing is detached here: the caller keeps a teacher that must not learn out of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# --- distributions


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """Bring probabilities to a temperature: ``p^(1/T) / Σ p^(1/T)``.

    For ``p = softmax(z)`` this is ``softmax(z / T)``.

    Args:
        probabilities: ``[n, C]``, rows on the simplex; a class of probability 0 keeps 0.
        temperature: T > 0; above 1 flattens, below 1 sharpens, 1 returns the input itself.
    """
    if temperature == 1:
        return probabilities
    return torch.softmax(_wide(probabilities).log() / temperature, dim=-1)


def entropy_reduction(probabilities: Tensor, temperature: float = 0.1) -> Tensor:
    """Sharpen a mean response by DS-FL's entropy reduction: ``softmax(p / T)`` of the *probabilities* themselves.

    Not the same as `soften`: the probabilities stand where logits usually do, and as they lie within 1 of each other,
    T = 0.1 (the paper's value) never makes one class more than e^10 times as likely as another. Source: Itahara et
    al., "Distillation-Based Semi-Supervised Federated Learning" (DS-FL), entropy reduction aggregation (ERA).

    Args:
        probabilities: mean of the clients' probabilities, ``[n, C]``.
        temperature: T > 0.
    """
    return torch.softmax(_wide(probabilities) / temperature, dim=-1)


def power_sharpening(probabilities: Tensor, exponent: float) -> Tensor:
    """Sharpen a mean response by SCARLET's enhanced entropy reduction: ``p^b / Σ p^b``.

    Args:
        probabilities: mean of the clients' probabilities, ``[n, C]``.
        exponent: b > 0; 1 changes nothing, above 1 sharpens.
    """
    return soften(probabilities, 1 / exponent)


def _wide(values: Tensor) -> Tensor:
    """Return 16-bit values as float32: a sum of logarithms needs more than bfloat16's 8 bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return ``log softmax(z / T)``."""
    return torch.log_softmax(_wide(logits) / temperature, -1)


def _divergence(log_q: Tensor, p: Tensor, *, log_p: bool = False) -> Tensor:
    """Return ``KL(p ‖ q)``, mean over rows. A class with p = 0 adds nothing."""
    if torch._C._are_functorch_transforms_active() and not log_p:  # for which torch's kernel has no vectorised form
        return (torch.xlogy(p, p) - p * log_q).sum(-1).mean()
    return F.kl_div(log_q, p, reduction="none", log_target=log_p).sum(-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy against hard labels, mean over rows.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]`` int64.
    """
    return F.cross_entropy(_wide(logits), labels)


# --- responses


def kd_loss(
    student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 1.0, *, scale: bool = True
) -> Tensor:
    """Compute Hinton's distillation loss: ``T² KL(teacher_T ‖ student_T)``, mean over rows.

    Its gradient with respect to the student's logits is ``T (p_student - p_teacher) / n``; without the factor T² it
    shrinks as 1/T². Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]`` at temperature 1.
        temperature: T > 0, applied to both sides.
        scale: multiply by T². ``False`` gives the bare forward KL (FedDF, which uses T = 1).

    Returns:
        A scalar in nats, 0 where student and teacher agree.
    """
    loss = _divergence(_log_softmax(student_logits, temperature), soften(teacher_probabilities, temperature))
    return loss * temperature**2 if scale else loss


def reverse_kl(
    student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 1.0, *, scale: bool = False
) -> Tensor:
    """Compute the mode-seeking divergence ``KL(student_T ‖ teacher_T)``, mean over rows (MiniLLM's objective).

    It is infinite where the teacher says exactly 0, so teacher probabilities are floored at the machine epsilon of
    their type.

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]`` at temperature 1.
        temperature: T > 0, applied to both sides.
        scale: multiply by T².
    """
    teacher = _wide(soften(teacher_probabilities, temperature))
    log_teacher = teacher.clamp_min(torch.finfo(teacher.dtype).eps).log()
    loss = _divergence(log_teacher, _log_softmax(student_logits, temperature), log_p=True)
    return loss * temperature**2 if scale else loss


def generalized_jsd(
    student_logits: Tensor, teacher_probabilities: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Compute the generalized Jensen-Shannon divergence between teacher and student, mean over rows.

    ``β KL(T ‖ M) + (1 - β) KL(S ‖ M)`` with ``M = β T + (1 - β) S``. The formula vanishes at both ends, so, as in TRL,
    β = 0 means the forward divergence ``KL(T ‖ S)`` and β = 1 the reverse ``KL(S ‖ T)``. At β = 0.5 it is symmetric
    and at most ln 2. No factor T². Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD).

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]`` at temperature 1.
        beta: in [0, 1].
        temperature: T > 0, applied to both sides.
    """
    if beta == 0:
        return kd_loss(student_logits, teacher_probabilities, temperature, scale=False)
    if beta == 1:
        return reverse_kl(student_logits, teacher_probabilities, temperature)
    log_student = _log_softmax(student_logits, temperature)
    teacher = _wide(soften(teacher_probabilities, temperature))
    # In logs: the product (1 - β) S may underflow in float32, the mixture's logarithm does not.
    log_mixture = torch.logaddexp(log_student + math.log1p(-beta), teacher.log() + math.log(beta))
    from_student = _divergence(log_mixture, log_student, log_p=True)
    return beta * _divergence(log_mixture, teacher) + (1 - beta) * from_student


def soft_cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the cross entropy ``-Σ p log softmax(z)`` against soft targets, mean over rows.

    It differs from the forward KL by the teacher's entropy, so it is not 0 where student and teacher agree; the
    gradients are the same. No factor T².

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]`` at temperature 1.
        temperature: T > 0, applied to both sides.
    """
    targets = soften(teacher_probabilities, temperature)
    return -(targets * _log_softmax(student_logits, temperature)).sum(-1).mean()


def hard_cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """Compute the cross entropy against the teacher's most likely class, mean over rows.

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]``; only which class is the largest counts.
    """
    return cross_entropy(student_logits, teacher_probabilities.argmax(-1))


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the squared difference of logits, mean over rows *and* classes; it is not shift-invariant."""
    return F.mse_loss(_wide(student_logits), _wide(teacher_logits))


def mae_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the absolute difference of logits, mean over rows *and* classes: FedMD's digest loss.

    Source: Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", and its published code.
    """
    return F.l1_loss(_wide(student_logits), _wide(teacher_logits))


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> dict[str, Tensor]:
    """Combine labels and a teacher: ``(1 - α) CE + α T² KL(teacher_T ‖ student_T)`` (Hinton et al.).

    Args:
        student_logits: ``[n, C]``.
        teacher_logits: ``[n, C]``.
        labels: ``[n]`` int64.
        alpha: the teacher's share, in [0, 1].
        temperature: T > 0, of the teacher's part only.

    Returns:
        ``loss`` (the total, with gradient) and its unweighted parts ``cross_entropy`` and ``distillation``, detached.
    """
    hard = cross_entropy(student_logits, labels)
    # From logits, not through probabilities: a tail below float32's smallest number still counts at T > 1.
    log_student, log_teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    soft = temperature**2 * _divergence(log_student, log_teacher, log_p=True)
    return {
        "loss": (1 - alpha) * hard + alpha * soft,
        "cross_entropy": hard.detach(),
        "distillation": soft.detach(),
    }


@dataclass(frozen=True)
class ResponseLoss:
    """A loss between a student's logits and received responses, with the form that the responses must have.

    Args:
        function: called with student logits, responses and the entries of ``settings``.
        form: what the responses must be: ``"probabilities"`` or ``"logits"``.
        softened: whether the function takes a temperature.
    """

    function: Callable[..., Tensor]
    form: Literal["probabilities", "logits"] = "probabilities"
    softened: bool = True

    def __call__(self, student_logits: Tensor, responses: Tensor, temperature: float = 1.0, **settings: Any) -> Tensor:
        """Return the loss, a scalar; a loss on raw logits has no use for the temperature and leaves it out."""
        if self.softened:
            settings["temperature"] = temperature
        return self.function(student_logits, responses, **settings)


RESPONSE_LOSSES: dict[str, ResponseLoss] = {
    "kl": ResponseLoss(kd_loss),
    "reverse_kl": ResponseLoss(reverse_kl),
    "jsd": ResponseLoss(generalized_jsd),
    "cross_entropy": ResponseLoss(soft_cross_entropy),
    "hard": ResponseLoss(hard_cross_entropy, softened=False),
    "mse": ResponseLoss(mse_logits, form="logits", softened=False),
    "mae": ResponseLoss(mae_logits, form="logits", softened=False),
}
"""The response losses by the name that a recipe gives."""


# --- features


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared difference of features, mean over rows *and* dimensions.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets"; the student's side comes through a projector.

    Args:
        student: ``[n, d]``.
        teacher: ``[n, d]``.
    """
    return F.mse_loss(_wide(student), _wide(teacher))


def feature_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the smooth L1 distance to the teacher's features, each row of which is brought to mean 0, deviation 1.

    Source: Baevski et al., "data2vec": targets are normalised, predictions are not. Mean over rows and dimensions.
    """
    teacher = _wide(teacher)
    return F.smooth_l1_loss(_wide(student), F.layer_norm(teacher, teacher.shape[-1:]))


def feature_normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared difference of rows of length 1, mean over rows *and* dimensions: ``2 (1 - cos) / d``.

    Source: CLIP-KD's feature distillation, which gives it a weight of 2000, since the mean over d makes it small.
    """
    return F.mse_loss(F.normalize(_wide(student), dim=-1), F.normalize(_wide(teacher), dim=-1))


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute ``1 - cos`` between the rows of student and teacher, mean over rows."""
    return (1 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)).mean()


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the distances between the rows of a batch; the two sides may have different widths.

    Distances are divided by their mean, and compared by the Huber loss, mean over ordered pairs of different rows. It
    does not change when either side is rotated, moved or scaled. Source: Park et al., "Relational Knowledge
    Distillation" (RKD-D).

    Args:
        student: ``[n, d]``, n ≥ 2; 0 for fewer rows.
        teacher: ``[n, e]``.
    """
    if len(student) < 2:
        return student.sum() * 0.0
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the angles that the rows of a batch form with each other; the two sides may have different widths.

    The cosine of the angle at row j between rows i and k, Huber loss, mean over triples of different rows; memory grows
    as n³. Source: Park et al., "Relational Knowledge Distillation" (RKD-A).

    Args:
        student: ``[n, d]``, n ≥ 3; 0 for fewer rows.
        teacher: ``[n, e]``.
    """
    count = len(student)
    if count < 3:
        return student.sum() * 0.0
    other = ~torch.eye(count, dtype=torch.bool, device=student.device)
    triples = other.unsqueeze(2) & other.unsqueeze(1) & other.unsqueeze(0)
    return F.smooth_l1_loss(_cosines_of_angles(student)[triples], _cosines_of_angles(teacher)[triples])


def relational(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare distances and angles, the angles twice as much as the distances (RKD-DA's proportion)."""
    return relational_distance(student, teacher) + 2 * relational_angle(student, teacher)


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute one minus the linear centred kernel alignment of the rows of a batch; widths may differ.

    ``1 - ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`` with centred columns, in [0, 1]. It does not change when either side is rotated,
    moved or scaled. Source: Kornblith et al., "Similarity of Neural Network Representations Revisited".

    Args:
        student: X, ``[n, d]``, n ≥ 2; 1 where one side does not vary.
        teacher: Y, ``[n, e]``.
    """
    x, y = (_wide(side) - _wide(side).mean(0) for side in (student, teacher))
    # Gram matrices of rows: a batch has fewer rows than features
    k, m = x @ x.T, y @ y.T
    scale = k.norm() * m.norm()
    return 1 - (k * m).sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _relative_distances(rows: Tensor) -> Tensor:
    """Distances of all pairs of different rows, over their mean, [n (n - 1) / 2]."""
    distances = F.pdist(_wide(rows))
    return distances / distances.mean().clamp_min(torch.finfo(distances.dtype).tiny)


def _cosines_of_angles(rows: Tensor) -> Tensor:
    """``[n, n, n]``: entry (j, i, k) is the cosine of the angle at j between i and k."""
    edges = _wide(rows).unsqueeze(0) - _wide(rows).unsqueeze(1)
    edges = F.normalize(edges, dim=-1)
    return edges @ edges.transpose(1, 2)


@dataclass(frozen=True)
class FeatureLoss:
    """A loss between features of a student and of a teacher.

    Args:
        function: called with both, ``[n, d]``.
        projected: whether it needs both in one space, so that the student's come through a projector.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    projected: bool

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss, a scalar."""
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
"""The feature losses by the name that a recipe gives."""


# --- prototypes


def prototype_mse(student: Tensor, prototypes: Tensor, assignment: Tensor) -> Tensor:
    """Compute the squared distance to the prototypes that a row belongs to, mean over rows *and* dimensions.

    ``Σ_j a_j ‖h - c_j‖² / d``. Source: Tan et al., "FedProto", with shares in the place of a class.

    Args:
        student: h, ``[n, d]``.
        prototypes: c, ``[m, d]``.
        assignment: a, ``[n, m]``, rows sum to 1: to what share a row belongs to each prototype.
    """
    distances = torch.cdist(_wide(student), _wide(prototypes), compute_mode="donot_use_mm_for_euclid_dist").square()
    return (assignment * distances).sum(1).mean() / student.shape[1]


def prototype_infonce(student: Tensor, prototypes: Tensor, assignment: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the contrast between the prototypes that a row belongs to and all others, mean over rows.

    ``-Σ_j a_j log (exp(h·c_j / t) / Σ_k exp(h·c_k / t))`` with rows and prototypes of length 1; log m where all m
    prototypes are equal. Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding".

    Args:
        student: h, ``[n, d]``.
        prototypes: c, ``[m, d]``.
        assignment: a, ``[n, m]``, rows sum to 1.
        temperature: t > 0.
    """
    similarity = F.normalize(_wide(student), dim=-1) @ F.normalize(_wide(prototypes), dim=-1).T
    return soft_cross_entropy(similarity / temperature, assignment)


PROTOTYPE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": prototype_mse,
    "infonce": prototype_infonce,
}
"""The prototype losses by the name that a recipe gives."""


# --- parameters


class _SquaredDistance(torch.autograd.Function):
    """``μ/2 Σ ‖w - a‖²`` with its gradient ``μ (w - a)`` in closed form.

    One node for all tensors: plain autograd keeps three tensors the size of the model and launches one kernel for
    each parameter, which costs 2 times more on a small MLP and 5 times more on a large network.
    """

    @staticmethod
    def forward(ctx, mu: float, count: int, *tensors: Tensor) -> Tensor:
        difference = torch._foreach_sub(tensors[:count], tensors[count:])
        ctx.mu = mu
        ctx.save_for_backward(*difference)
        return mu / 2 * torch.stack(torch._foreach_norm(difference)).square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        difference = ctx.saved_tensors
        return None, None, *torch._foreach_mul(difference, gradient * ctx.mu), *[None] * len(difference)


def proximal(parameters: Iterable[Tensor], anchor: Iterable[Tensor], mu: float) -> Tensor:
    """Compute FedProx's proximal term ``μ/2 ‖w - w_t‖²`` over all parameters.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", equation 2, with its factor 1/2.

    Args:
        parameters: the trainable parameters w.
        anchor: the round's global values w_t, in the same order and of the same shapes; no gradient flows to them.
        mu: μ ≥ 0.

    Raises:
        ValueError: there are none, or the two lists differ in length.
    """
    parameters, anchor = list(parameters), list(anchor)
    if not parameters or len(parameters) != len(anchor):
        raise ValueError(f"the proximal term got {len(parameters)} parameters and {len(anchor)} anchors")
    if torch._C._are_functorch_transforms_active():  # clients that train together: such a node would cost more there
        return mu / 2 * torch.stack([(w - a.detach()).square().sum() for w, a in zip(parameters, anchor)]).sum()
    return _SquaredDistance.apply(mu, len(parameters), *parameters, *anchor)
