"""Gradients of models of which every rank holds a part: what FSDP leaves to do before an optimiser may step.

FSDP averages the gradients of parts over ranks. Those of what every rank has whole (scalars, helpers that are trained
beside a model) are averaged here; the norm, and sums over all weights, are taken of all parts.
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
    """Those that are spread over ranks, and the others."""
    parts = [p for p in parameters if isinstance(p, DTensor)]
    return parts, [p for p in parameters if not isinstance(p, DTensor)]


def average_replicated(parameters: Sequence[nn.Parameter], ranks: ProcessGroup) -> None:
    """Average the gradients of what every rank has whole."""
    others = [p for p in split_sharded(parameters)[1] if p.grad is not None]
    if others and ranks.count > 1:
        ranks.sum_gradients(others)
        for p in others:
            p.grad /= ranks.count


def clip_gradients(parameters: Sequence[nn.Parameter], most: float, device: torch.device) -> None:
    """Scale gradients so that the norm of all together, over all ranks, is no more than `most`.

    As ``torch.nn.utils.clip_grad_norm_``, which takes parts or whole tensors, but not both.
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
    """An objective's penalty, a sum over all weights: what every rank has whole counts once.

    Args:
        objective: with ``penalty(parameters, anchor)`` and an `anchor` for each of the module's parameters.
        module: not within a step, where some of its weights are whole.
        device: of the result, float64.
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
    """Add the gradient of an objective's penalty to those that are there; arguments as in `penalty`."""
    own = list(module.parameters())
    leaves = [local_shard(p).detach().requires_grad_() for p in own]
    pulls = torch.autograd.grad(objective.penalty(leaves, [local_shard(a) for a in objective.anchor]), leaves)
    for p, gradient in zip(own, pulls):
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            local_shard(p.grad).add_(gradient)


def _sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of all squares, float64 on a device."""
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in torch._foreach_norm(gradients)]).square().sum()
