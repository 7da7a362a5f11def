"""Named tensors in one contiguous buffer, which can be processed as one vector.

Small models consist of small tensors, for which the overhead of each operation dominates.
"""

from __future__ import annotations

import math
from collections.abc import ItemsView, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fdl.state.flat_arrays import FlatArrays


class FlatTensors(Mapping[str, Tensor]):
    """Named tensors that fill one vector in order; views of it are created at the first access.

    Args:
        buffer: the vector [n], of any type and device.
        shapes: shape of each tensor by name, in order; n elements in all.
    """

    def __init__(self, buffer: Tensor, shapes: dict[str, tuple[int, ...]]):
        self.buffer, self.shapes = buffer, shapes

    @cached_property
    def _views(self) -> dict[str, Tensor]:
        parts = self.buffer.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatTensors:
        return FlatTensors(self.buffer.clone(), self.shapes)

    @cached_property
    def layout(self) -> tuple:
        """Names and shapes, as a hashable value to compare."""
        return tuple(self.shapes.items())

    @cached_property
    def arrays(self) -> FlatArrays | None:
        """The same memory as numpy arrays; None unless it is float32 in host memory."""
        if self.buffer.device.type != "cpu" or self.buffer.dtype is not torch.float32:
            return None
        return FlatArrays(self.buffer.numpy(), self.shapes)

    @classmethod
    def of(cls, arrays: FlatArrays) -> FlatTensors:
        """Wrap arrays as tensors that share their memory."""
        return cls(torch.from_numpy(arrays.buffer), arrays.shapes)

    def items(self) -> ItemsView[str, Tensor]:
        """Return names and views, as fast as a dict does."""
        return self._views.items()


def flat_view(tensors: Iterable[Tensor]) -> Tensor | None:
    """View tensors as one vector, without a copy, if they are adjacent in one storage, as decoded ones are.

    Small models consist of small tensors, for which the overhead of each operation dominates.

    Args:
        tensors: in order, of any shapes.

    Returns:
        A view of all elements in order, [n]; None if there is no such view.

    Example:
        >>> import torch
        >>> whole = torch.arange(6.0)
        >>> flat_view([whole[:2], whole[2:]])
        tensor([0., 1., 2., 3., 4., 5.])
        >>> flat_view([whole[:2], whole[4:]]) is None
        True
    """
    tensors = list(tensors)
    if not tensors:
        return None
    first = tensors[0]
    dtype, size = first.dtype, 0
    start = end = first.data_ptr()
    for tensor in tensors:
        if tensor.dtype is not dtype or tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        size += tensor.numel()
        end = start + size * first.itemsize
    storage = first.untyped_storage()
    # neighbours in memory may belong to different storages
    if end > storage.data_ptr() + storage.nbytes():
        return None
    return first.as_strided((size,), (1,))


def flatten_module_(module: nn.Module) -> FlatTensors | None:
    """Move a module's parameters and buffers into one vector, in the order of its state; values do not change.

    Args:
        module: changed in place; moving or converting it later gives its tensors separate memory again.

    Returns:
        The module's state; None, and nothing is moved, if it is not all of one floating-point type on one device, or
        tensors are shared or strided.
    """
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    names = list(module.state_dict())
    if not names or any(name not in named for name in names):
        return None
    own = [named[name] for name in names]
    kinds = {(tensor.dtype, tensor.device) for tensor in own}
    alone = len({tensor.untyped_storage().data_ptr() for tensor in own}) == len(own)
    if len(kinds) > 1 or not own[0].is_floating_point() or not alone or not all(t.is_contiguous() for t in own):
        return None
    buffer = torch.cat([tensor.detach().reshape(-1) for tensor in own])
    state = FlatTensors(buffer, {name: tuple(named[name].shape) for name in names})
    for name, view in state.items():
        named[name].data = view
    return state
