"""Models sharded over ranks by torch's fully sharded data parallelism (FSDP), used like unsharded ones.

A block's weights are gathered when it is called, and freed when it is done; those outside of blocks (embeddings, the
head) are gathered for a whole task. Tensors are sharded on dimension 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")

LARGEST = 8
"""Blocks with more than 1/8 of a model's parameters are split further, if they contain blocks themselves."""


def shard(module: nn.Module, mesh: DeviceMesh, rounded: torch.dtype | None = None) -> None:
    """Shard every parameter of a module over the ranks of a mesh, on its device; buffers and scalars are replicated.

    Children of lists and sequences are the blocks. A model is moved to the device block by block, so that it need not
    fit there as a whole.

    Args:
        module: in host memory, the same on all ranks; its parameters are replaced permanently.
        mesh: device mesh of all ranks, with one dimension.
        rounded: type that autocast rounds weights to; None: none. Blocks are gathered in this type: otherwise every
            step would hold its own rounded copies of all of them until its backward pass. Weights that autocast does
            not round, those of normalisation, are replicated.
    """
    kept = {p for p in module.parameters() if p.ndim == 0}
    for part in module.modules() if rounded is not None else ():
        own = [p for p in part._parameters.values() if p is not None]
        kept |= set(own) if all(p.ndim < 2 for p in own) else set()
    for p in kept:
        p.data = p.data.to(mesh.device_type)
    narrow = any(p.dtype.itemsize < 4 for p in module.parameters())
    reduce = torch.float32 if rounded is not None or narrow else None
    settings = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": kept}
    found = [block for block in sharding_units(module) if not kept.issuperset(block.parameters())]
    for block in found:
        policy = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=reduce, cast_forward_inputs=False)
        fully_shard(block, mp_policy=policy, **settings)
    entrance = _Entrance(module)
    module.forward = entrance
    # embeddings keep their type, so that what blocks add to them is not rounded
    policy = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    fully_shard(entrance.root, mp_policy=policy, **settings)
    with torch.no_grad():
        _enter(entrance.root, lambda: None)  # torch sets up its hierarchy of units in the first forward pass
        for block in found:  # buffers allocated in inference mode, as by an evaluation, could not be trained in
            block.unshard()
            block.reshard()


def sharding_units(module: nn.Module) -> list[nn.Module]:
    """List the blocks that are gathered one at a time, inner ones before outer ones.

    All other parameters are gathered with the model, and so are those of a block that shares one with its rest.

    Args:
        module: the model, not sharded yet.
    """
    users = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
    total = sum(p.numel() for p in module.parameters())
    found: list[nn.Module] = []

    def contained(part: nn.Module) -> bool:
        own = Counter(id(p) for some in part.modules() for p in some._parameters.values() if p is not None)
        return bool(own) and all(users[key] == count for key, count in own.items())

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            # a list is not called, so there is no moment at which to gather it
            callable_ = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            block = isinstance(parent, nn.ModuleList | nn.Sequential) and callable_ and contained(child)
            size = sum(p.numel() for p in child.parameters())
            if not block or size * LARGEST > total:
                visit(child)
            if block and child not in found:
                found.append(child)

    visit(module)
    return found


def with_gathered_blocks(module: nn.Module, task: Callable[[], T]) -> T:
    """Run a task that may use the sharded models within a module in any way, and be differentiated afterwards.

    Args:
        module: a sharded model, or one that contains sharded models; any other is used as it is.
        task: the function to call, the same on all ranks.

    Returns:
        The task's result.
    """
    for root in _roots(module):
        if not root.open:
            task = partial(_enter, root, task)
    return task()


@contextmanager
def full_parameters(*modules: nn.Module) -> Iterator[None]:
    """Gather all parameters of sharded models within this context, for use without gradients, on all ranks together."""
    roots = [root for module in modules for root in _roots(module) if not root.open]
    for root in roots:
        root.unshard()
        root.open = True
    try:
        yield
    finally:
        for root in roots:
            root.open = False
            root.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Return True if a model, or a submodule of it, is sharded over ranks."""
    return bool(_roots(module))


def full_tensor_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory; a collective operation if it is sharded, which gives every rank the full tensor."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, without a copy: all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(target: Tensor, source: Tensor) -> Tensor:
    """Select the rows of a full tensor that correspond to this rank's shard of a target of the same shape."""
    if not isinstance(target, DTensor):
        return source
    parts, rank = source.chunk(target.device_mesh.size()), target.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else source[:0]


class _Root(nn.Module):
    """The module that FSDP takes for the whole model: in its forward, weights outside of blocks are gathered."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.open = module, False

    def forward(self, task: Callable[[], T]) -> T:
        return task()


class _Entrance:
    """A sharded model's forward, which goes through its root unless a caller already has."""

    def __init__(self, module: nn.Module):
        self._forward, self.root = module.forward, _Root(module)
        update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.root.open:
            return self._forward(*args, **kwargs)
        return _enter(self.root, partial(self._forward, *args, **kwargs))


def _enter(root: _Root, task: Callable[[], T]) -> T:
    root.open = True
    try:
        return root(task)
    finally:
        root.open = False


def _roots(module: nn.Module) -> list[_Root]:
    own = (part.__dict__.get("forward") for part in module.modules())
    return [forward.root for forward in own if isinstance(forward, _Entrance)]
