"""Gradients of sharded models: the work that FSDP leaves to do before an optimiser step.

FSDP averages the gradients of shards over ranks. Those of replicated parameters (scalars, helpers that are trained
along with a model) are averaged here; the norm, and sums over all weights, are computed over all shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fdl.state.shards import local_shard

if TYPE_CHECKING:
    from fdl.engine.distributed.process_group import ProcessGroup


def split_sharded(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into sharded and replicated ones.

    Args:
        parameters: parameters of a sharded model and its helpers.

    Returns:
        The sharded parameters, and the replicated ones.
    """
    parts = [p for p in parameters if isinstance(p, DTensor)]
    return parts, [p for p in parameters if not isinstance(p, DTensor)]


def average_replicated(parameters: Sequence[nn.Parameter], ranks: ProcessGroup) -> None:
    """Average the gradients of replicated parameters over ranks.

    Args:
        parameters: the same parameters on all ranks; sharded ones are skipped.
        ranks: the processes.
    """
    others = [p for p in split_sharded(parameters)[1] if p.grad is not None]
    if others and ranks.count > 1:
        ranks.sum_gradients(others)
        for p in others:
            p.grad /= ranks.count


def clip_gradients(parameters: Sequence[nn.Parameter], most: float, device: torch.device) -> None:
    """Scale gradients so that their total norm, over all parameters and ranks, is no more than `most`.

    The same as ``torch.nn.utils.clip_grad_norm_``, which accepts either sharded or replicated tensors, but not both.

    Args:
        parameters: the trained parameters, sharded and replicated.
        most: largest norm.
        device: device of the process group.
    """
    parts, others = ([local_shard(p.grad) for p in some if p.grad is not None] for some in split_sharded(parameters))
    squares = _sum_of_squares(parts, device)
    dist.all_reduce(squares)
    norm = (squares + _sum_of_squares(others, device)).sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*parts, *others):
        gradient.mul_(factor.to(gradient.dtype))


@torch.no_grad()
def penalty(objective: Any, module: nn.Module, device: torch.device) -> Tensor:
    """Compute an objective's penalty, a sum over all weights in which replicated ones count once.

    Args:
        objective: has ``penalty(parameters, anchor)`` and an `anchor` per parameter of the module.
        module: the sharded module, outside of its forward pass, in which some weights are gathered.
        device: device of the process group.

    Returns:
        float64 scalar on the device, the same on all ranks.
    """
    values = torch.zeros(2, dtype=torch.float64, device=device)
    pairs = list(zip(module.parameters(), objective.anchor, strict=True))
    for i, spread in enumerate((True, False)):
        some = [(local_shard(p), local_shard(a)) for p, a in pairs if isinstance(p, DTensor) is spread]
        if some:
            values[i] = objective.penalty(*map(list, zip(*some)))
    dist.all_reduce(values[:1])
    return values.sum()


def add_penalty_gradient(objective: Any, module: nn.Module) -> None:
    """Add the gradient of an objective's penalty to the parameters' gradients.

    Args:
        objective: has ``penalty(parameters, anchor)`` and an `anchor` per parameter of the module.
        module: the sharded module.
    """
    own = list(module.parameters())
    leaves = [local_shard(p).detach().requires_grad_() for p in own]
    pulls = torch.autograd.grad(objective.penalty(leaves, [local_shard(a) for a in objective.anchor]), leaves)
    for p, gradient in zip(own, pulls):
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            local_shard(p.grad).add_(gradient)


def _sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all elements, a float64 scalar on a device."""
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in torch._foreach_norm(gradients)]).square().sum()
