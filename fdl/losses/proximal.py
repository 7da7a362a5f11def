"""Proximal term, which keeps a model close to given weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _SquaredDistance(torch.autograd.Function):
    """Squared distance ``μ/2 Σ ‖w - a‖²`` with its gradient ``μ (w - a)`` in closed form.

    A single node for all tensors: plain autograd stores three tensors of the size of the model and launches one kernel
    per parameter, which takes twice the time on a small MLP and five times on a large network.
    """

    @staticmethod
    def forward(ctx: Any, mu: float, count: int, *tensors: Tensor) -> Tensor:
        difference = torch._foreach_sub(tensors[:count], tensors[count:])
        ctx.mu = mu
        ctx.save_for_backward(*difference)
        return mu / 2 * torch.stack(torch._foreach_norm(difference)).square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        difference = ctx.saved_tensors
        return None, None, *torch._foreach_mul(difference, gradient * ctx.mu), *[None] * len(difference)


def proximal(parameters: Iterable[Tensor], anchor: Iterable[Tensor], mu: float) -> Tensor:
    """Compute FedProx's proximal term ``μ/2 ‖w - w_t‖²`` over all parameters.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", equation 2, with its factor 1/2.

    Args:
        parameters: the trainable parameters w.
        anchor: the round's global values w_t, in the same order and of the same shapes; no gradient flows to them.
        mu: coefficient μ ≥ 0.

    Raises:
        ValueError: there are no parameters, or the two lists differ in length.

    Example:
        >>> import torch
        >>> weights, anchor = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 0.0])]
        >>> proximal(weights, anchor, mu=0.1)  # 0.1 / 2 · 25
        tensor(1.2500)
    """
    parameters, anchor = list(parameters), list(anchor)
    if not parameters or len(parameters) != len(anchor):
        raise ValueError(f"the proximal term got {len(parameters)} parameters and {len(anchor)} anchors")
    if torch._C._are_functorch_transforms_active():  # vectorised clients, for which the single node is slower
        return mu / 2 * torch.stack([(w - a.detach()).square().sum() for w, a in zip(parameters, anchor)]).sum()
    return _SquaredDistance.apply(mu, len(parameters), *parameters, *anchor)
