"""Models of which every rank holds a part: torch's fully sharded data parallelism, used like whole models.

A block's weights are gathered when it is called, and let go when it is done; those outside of blocks (embeddings, the
head) are gathered for a whole task. Parts lie on dimension 0.
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
"""Blocks with more than one in so many of a model's parameters are cut further, where they have blocks themselves."""


def shard(module: nn.Module, mesh: DeviceMesh, rounded: torch.dtype | None = None) -> None:
    """Leave this rank its part of every parameter, on the mesh's device; buffers and scalars stay whole.

    Children of lists and sequences are the blocks. A model goes to the device block by block, so that it need not fit
    there as a whole.

    Args:
        module: in host memory, the same on all ranks; its parameters are replaced, once and for all.
        mesh: of all ranks, with one dimension.
        rounded: what autocast rounds weights to; None: nothing. Blocks are gathered in this type: otherwise every step
            would hold its own rounded copies of all of them until its backward pass. What autocast leaves alone, the
            weights of normalisation, stays whole.
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
    # embeddings as they are: what blocks add to them is not rounded then
    policy = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    fully_shard(entrance.root, mp_policy=policy, **settings)
    with torch.no_grad():
        _enter(entrance.root, lambda: None)  # here torch learns what belongs together
        for block in found:  # buffers made in inference mode, as an evaluation would, could not be trained in
            block.unshard()
            block.reshard()


def sharding_units(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time, inner blocks before outer ones; what is left belongs to the whole model.

    A block that shares a parameter with the rest of the model is none.
    """
    users = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
    total = sum(p.numel() for p in module.parameters())
    found: list[nn.Module] = []

    def contained(part: nn.Module) -> bool:
        own = Counter(id(p) for some in part.modules() for p in some._parameters.values() if p is not None)
        return bool(own) and all(users[key] == count for key, count in own.items())

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            # a list cannot be called, so nobody could tell when it is needed
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
        module: sharded, or holding such; anything else is left alone.
        task: the same on all ranks.
    """
    for root in _roots(module):
        if not root.open:
            task = partial(_enter, root, task)
    return task()


@contextmanager
def full_parameters(*modules: nn.Module) -> Iterator[None]:
    """Within this context sharded models may be used in any way, without being differentiated; all ranks come along."""
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
    """Whether a model's parameters, or those of a part of it, are spread over ranks."""
    return bool(_roots(module))


def full_tensor_cpu(tensor: Tensor) -> Tensor:
    """A whole copy in host memory; of what is spread over ranks, all of them get one together."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in place: all of it, where it is not spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(target: Tensor, source: Tensor) -> Tensor:
    """The rows of a whole tensor that belong to this rank's part of a target of the same shape."""
    if not isinstance(target, DTensor):
        return source
    parts, rank = source.chunk(target.device_mesh.size()), target.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else source[:0]


class _Root(nn.Module):
    """What torch takes for the whole model: within its forward, weights outside of blocks are whole."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.open = module, False

    def forward(self, task: Callable[[], T]) -> T:
        return task()


class _Entrance:
    """A sharded model's forward, which passes through its root unless somebody has done so before."""

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
