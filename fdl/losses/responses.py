"""Distillation losses between distributions as pure functions of tensors.

Conventions, the same in every function here and in `fdl.losses.features` and `fdl.losses.prototypes`:

- the student is given by *logits* ``[n, C]``, the teacher by *probabilities* ``[n, C]`` (rows that sum to 1, zeros
  allowed, e.g. one-hot votes), because aggregated responses are probabilities. Mean logits are converted with
  ``softmax`` once. Only `mse_logits`, `mae_logits` and `distillation` take a teacher's logits;
- a temperature T softens both sides: the student by ``softmax(z / T)``, the teacher by `soften`, which is equivalent
  for ``p = softmax(z)``;
- a loss is summed over the classes and averaged over the n rows ("batchmean");
- 16-bit inputs are computed in float32;
- nothing is detached here: the caller must detach a teacher that is not to be trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """Apply a temperature to probabilities: ``p^(1/T) / Σ p^(1/T)``.

    For ``p = softmax(z)`` this is ``softmax(z / T)``.

    Args:
        probabilities: ``[n, C]``, rows on the simplex; a class of probability 0 keeps 0.
        temperature: T > 0; above 1 flattens, below 1 sharpens, 1 returns the input itself.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.9, 0.1]])
        >>> soften(p, 2.0)
        tensor([[0.7500, 0.2500]])
    """
    if temperature == 1:
        return probabilities
    return torch.softmax(upcast(probabilities).log() / temperature, dim=-1)


def entropy_reduction(probabilities: Tensor, temperature: float = 0.1) -> Tensor:
    """Sharpen a mean response by DS-FL's entropy reduction: ``softmax(p / T)`` of the *probabilities* themselves.

    It differs from `soften`: probabilities are used as logits, and because they differ by at most 1, T = 0.1 (the
    paper's value) makes no class more than e^10 times as likely as another. Source: Itahara et al.,
    "Distillation-Based Semi-Supervised Federated Learning" (DS-FL), entropy reduction aggregation (ERA).

    Args:
        probabilities: mean of the clients' probabilities, ``[n, C]``.
        temperature: T > 0.

    Example:
        >>> import torch
        >>> entropy_reduction(torch.tensor([[0.6, 0.4]]))
        tensor([[0.8808, 0.1192]])
    """
    return torch.softmax(upcast(probabilities) / temperature, dim=-1)


def power_sharpening(probabilities: Tensor, exponent: float) -> Tensor:
    """Sharpen a mean response by SCARLET's enhanced entropy reduction: ``p^b / Σ p^b``.

    Args:
        probabilities: mean of the clients' probabilities, ``[n, C]``.
        exponent: b > 0; 1 changes nothing, above 1 sharpens.

    Example:
        >>> import torch
        >>> power_sharpening(torch.tensor([[0.6, 0.4]]), exponent=2)
        tensor([[0.6923, 0.3077]])
    """
    return soften(probabilities, 1 / exponent)


def upcast(values: Tensor) -> Tensor:
    """Convert 16-bit values to float32: a sum of logarithms needs more than bfloat16's 8 bits.

    Args:
        values: floating-point tensor; returned unchanged if it has 32 or 64 bits.

    Example:
        >>> import torch
        >>> upcast(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return ``log softmax(z / T)``."""
    return torch.log_softmax(upcast(logits) / temperature, -1)


def _divergence(log_q: Tensor, p: Tensor, *, log_p: bool = False) -> Tensor:
    """Return ``KL(p ‖ q)``, mean over rows. A class with p = 0 contributes nothing."""
    if torch._C._are_functorch_transforms_active() and not log_p:  # torch's kernel has no vectorised form of this
        return (torch.xlogy(p, p) - p * log_q).sum(-1).mean()
    return F.kl_div(log_q, p, reduction="none", log_target=log_p).sum(-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy against hard labels, mean over rows.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]`` int64.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))  # log 2
        tensor(0.6931)
    """
    return F.cross_entropy(upcast(logits), labels)


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

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> bool(kd_loss(logits, torch.softmax(logits, 1)).abs() < 1e-6)  # they agree
        True
        >>> kd_loss(logits, torch.tensor([[0.5, 0.5]]))
        tensor(0.4338)
        >>> kd_loss(logits, torch.tensor([[0.5, 0.5]]), temperature=2.0)
        tensor(0.4805)
    """
    loss = _divergence(_log_softmax(student_logits, temperature), soften(teacher_probabilities, temperature))
    return loss * temperature**2 if scale else loss


def reverse_kl(
    student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 1.0, *, scale: bool = False
) -> Tensor:
    """Compute the mode-seeking divergence ``KL(student_T ‖ teacher_T)``, mean over rows (MiniLLM's objective).

    It would be infinite for teacher probabilities of exactly 0, so they are floored at the machine epsilon of their
    type.

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]`` at temperature 1.
        temperature: T > 0, applied to both sides.
        scale: multiply by T².

    Example:
        >>> import torch
        >>> reverse_kl(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))
        tensor(0.5108)
    """
    teacher = upcast(soften(teacher_probabilities, temperature))
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

    Example:
        >>> import torch
        >>> confident = torch.tensor([[50.0, 0.0]])
        >>> generalized_jsd(confident, torch.tensor([[0.0, 1.0]]))  # opposite predictions: log 2
        tensor(0.6931)
    """
    if beta == 0:
        return kd_loss(student_logits, teacher_probabilities, temperature, scale=False)
    if beta == 1:
        return reverse_kl(student_logits, teacher_probabilities, temperature)
    log_student = _log_softmax(student_logits, temperature)
    teacher = upcast(soften(teacher_probabilities, temperature))
    # in log space: the product (1 - β) S may underflow in float32, the mixture's logarithm does not
    log_mixture = torch.logaddexp(log_student + math.log1p(-beta), teacher.log() + math.log(beta))
    from_student = _divergence(log_mixture, log_student, log_p=True)
    return beta * _divergence(log_mixture, teacher) + (1 - beta) * from_student


def soft_cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the cross entropy ``-Σ p log softmax(z)`` against soft targets, mean over rows.

    It differs from the forward KL by the teacher's entropy, so it is not 0 if student and teacher agree; the gradients
    are the same. No factor T².

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]`` at temperature 1.
        temperature: T > 0, applied to both sides.

    Example:
        >>> import torch
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))  # the teacher's entropy, log 2
        tensor(0.6931)
    """
    targets = soften(teacher_probabilities, temperature)
    return -(targets * _log_softmax(student_logits, temperature)).sum(-1).mean()


def hard_cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """Compute the cross entropy against the teacher's most likely class, mean over rows.

    Args:
        student_logits: ``[n, C]``.
        teacher_probabilities: ``[n, C]``; only the most likely class of each row is used.

    Example:
        >>> import torch
        >>> hard_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.6, 0.4]]))
        tensor(0.6931)
    """
    return cross_entropy(student_logits, teacher_probabilities.argmax(-1))


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the squared difference of logits, mean over rows *and* classes; it is not shift-invariant.

    Args:
        student_logits: ``[n, C]``.
        teacher_logits: ``[n, C]``.

    Example:
        >>> import torch
        >>> mse_logits(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]))  # (1 + 4) / 2
        tensor(2.5000)
    """
    return F.mse_loss(upcast(student_logits), upcast(teacher_logits))


def mae_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the absolute difference of logits, mean over rows *and* classes: FedMD's digest loss.

    Source: Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", and its published code.

    Args:
        student_logits: ``[n, C]``.
        teacher_logits: ``[n, C]``.

    Example:
        >>> import torch
        >>> mae_logits(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]))  # (1 + 2) / 2
        tensor(1.5000)
    """
    return F.l1_loss(upcast(student_logits), upcast(teacher_logits))


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> dict[str, Tensor]:
    """Combine the losses of labels and teacher: ``(1 - α) CE + α T² KL(teacher_T ‖ student_T)`` (Hinton et al.).

    Args:
        student_logits: ``[n, C]``.
        teacher_logits: ``[n, C]``.
        labels: ``[n]`` int64.
        alpha: weight α of the teacher's loss, in [0, 1].
        temperature: T > 0, applied to the teacher's loss only.

    Returns:
        ``loss`` (the total, with gradient) and its unweighted parts ``cross_entropy`` and ``distillation``, detached.

    Example:
        >>> import torch
        >>> student, labels = torch.zeros(1, 2), torch.tensor([0])
        >>> distillation(student, student, labels, alpha=0.5, temperature=2.0)
        {'loss': tensor(0.3466), 'cross_entropy': tensor(0.6931), 'distillation': tensor(0.)}
    """
    hard = cross_entropy(student_logits, labels)
    # computed from logits, not from probabilities: a tail below float32's smallest number still matters at T > 1
    log_student, log_teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    soft = temperature**2 * _divergence(log_student, log_teacher, log_p=True)
    return {
        "loss": (1 - alpha) * hard + alpha * soft,
        "cross_entropy": hard.detach(),
        "distillation": soft.detach(),
    }


@dataclass(frozen=True)
class ResponseLoss:
    """Loss between a student's logits and received responses, with the form that the responses must have.

    Args:
        function: function of student logits, responses and the entries of ``settings``.
        form: required form of the responses: ``"probabilities"`` or ``"logits"``.
        softened: True if the function takes a temperature.
    """

    function: Callable[..., Tensor]
    form: Literal["probabilities", "logits"] = "probabilities"
    softened: bool = True

    def __call__(self, student_logits: Tensor, responses: Tensor, temperature: float = 1.0, **settings: Any) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student_logits: ``[n, C]``.
            responses: probabilities or logits ``[n, C]``, see `form`.
            temperature: T > 0; ignored by losses on raw logits.
            settings: further arguments of the function.
        """
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
"""Response losses by their name in a recipe."""
