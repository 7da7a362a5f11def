"""Models of one architecture side by side in memory, so that one pass serves many of them (`torch.func.vmap`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fdl.engine.inference import map_tensors
from fdl.engine.tracing.step_recorder import StepTracer
from fdl.state.flat_tensors import FlatTensors
from fdl.state.model_handle import RowHandle
from fdl.state.weights import module_state

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.recipe.config import Component


SMALL = {"cpu": 60_000, "cuda": 1_000_000}
"""Parameters up to which `auto` trains clients together, by kind of device; nowhere else.

Clients that train together save the cost of calling operations, which only small models feel. Measured on one core,
10 clients with batches of 32: rounds take 0.5 to 0.7 of the time with perceptrons and convolutional networks of up to
50 000 parameters, as long at 170 000, and 1.3 times as long at 600 000, where the weights of all no longer fit into the
cache. The figure for GPUs is a guess on the safe side.
"""

_ALIGN = 16
"""Rows begin where memory of their own would: on another boundary the same sums are rounded otherwise."""


def unstackable(module: nn.Module) -> str | None:
    """Why models of this kind cannot be trained in one pass; None when nothing speaks against it.

    What shows only when it is tried, e.g. control flow that depends on data, is not found here.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        return "nothing in it is trained"
    for part in module.modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            return "normalisation keeps running statistics"
        if isinstance(part, _DropoutNd) and part.p > 0:
            return "dropout draws from each client's own stream"
    if left := [name for name in module_state(module) if name not in named]:
        return f"{left[0]!r} belongs to its state and is not trained"
    kinds = {(p.dtype, p.device) for p in named.values()}
    if len(kinds) > 1 or next(iter(kinds))[0] is not torch.float32:
        return "its weights are not all 32-bit numbers on one device"
    return None


class StackedModels:
    """Copies of a template whose trained weights are the rows of one matrix; frozen weights exist once.

    Args:
        template: a module that is not `unstackable`.
        count: copies.

    Attributes:
        whole: the weights, float32 [count, P]; rows are filled up with zeros.
        modules: the copies, whose weights are views of the rows.
        names: of the trained weights, in order.
        grad: room for their gradients, like `whole`.
        optimizers: and `views`: what fits make of these and use again.
        recorder: of their steps.
    """

    def __init__(self, template: nn.Module, count: int):
        own = dict(template.named_parameters())
        shapes = {name: tuple(own[name].shape) for name in module_state(template)}
        self.names, self.shapes = list(shapes), [torch.Size(shape) for shape in shapes.values()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.whole = next(iter(own.values())).new_zeros(count, -(-sum(self.sizes) // _ALIGN) * _ALIGN)
        self.grad = torch.zeros_like(self.whole)
        self.optimizers: dict[Component, tuple] = {}
        self.views: dict[int, tuple] = {}
        self.recorder = StepTracer()
        public = {id(parameter): parameter for parameter in own.values() if not parameter.requires_grad}
        self.modules = [self._row(copy.deepcopy(template, dict(public)), row, shapes) for row in self.whole]
        self._trained = [[dict(m.named_parameters())[name] for name in self.names] for m in self.modules]
        self._skeleton = copy.deepcopy(template, dict(public))
        parameters = dict(self._skeleton.named_parameters())
        places = {id(parameters[name]): i for i, name in enumerate(self.names)}
        # tied weights have several places
        self._places = [
            (part._parameters, key, places[id(parameter)])
            for part in self._skeleton.modules()
            for key, parameter in part._parameters.items()
            if id(parameter) in places
        ]
        for part in self._skeleton.modules():
            if type(part) is nn.Linear:
                part.forward = partial(_linear, part)

    def pieces(self, matrix: Tensor) -> list[Tensor]:
        """Views of a matrix [K, P] as the stacked weights [K, …], by name."""
        sizes = [*self.sizes, matrix.shape[1] - sum(self.sizes)]
        parts = zip(matrix.split(sizes, 1), self.shapes)
        return [part.unflatten(1, shape) if shape else part.squeeze(1) for part, shape in parts]

    def trained(self, row: int) -> list[nn.Parameter]:
        """One copy's weights that were trained when the stack was made."""
        return self._trained[row]

    def skeleton(self, training: bool) -> nn.Module:
        """The module that stands for all copies in `together`."""
        if self._skeleton.training != training:
            self._skeleton.train(training)
        return self._skeleton

    def together(
        self, function: Callable[..., Any], weights: Sequence[Tensor], arguments: tuple[Any, ...], shared: bool = False
    ) -> Any:
        """Call a function of a module for several models at once.

        Args:
            function: called with the module and, for each model, its part of the arguments.
            weights: of K models, [K, …] each, as `pieces` gives them.
            arguments: tensors, and tuples and lists of them; [K, …], or the same for all models.
            shared: the arguments are the same for all models.

        Returns:
            What the function returns, every tensor with K as its first dimension.

        Raises:
            RuntimeError: it cannot be vectorised.
        """

        def one(weights: list[Tensor], arguments: tuple[Any, ...]) -> Any:
            with self._filled(weights):
                return function(self._skeleton, *arguments)

        return torch.func.vmap(one, in_dims=(0, None if shared else 0))(list(weights), arguments)

    @contextmanager
    def _filled(self, weights: Sequence[Tensor]) -> Iterator[None]:
        before = [parameters[key] for parameters, key, _ in self._places]
        try:
            for parameters, key, i in self._places:
                parameters[key] = weights[i]
            yield
        finally:
            for (parameters, key, _), parameter in zip(self._places, before):
                parameters[key] = parameter

    def _row(self, module: nn.Module, row: Tensor, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
        """Move a copy's weights into a row."""
        state, parameters = FlatTensors(row[: sum(self.sizes)], shapes), dict(module.named_parameters())
        for name, view in state.items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
        RowHandle(module, state)
        return module


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return x Wᵀ + b in operations that vmap does not take apart, which saves a tenth of a step."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y = torch.mm(rows, layer.weight.t())
    y = y if layer.bias is None else y + layer.bias
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], -1)


def activations(module: nn.Module, samples: Samples, batch_size: int) -> int:
    """Bytes that a training step on one batch keeps for its gradient; 0 where the module has no step for such samples.

    Args:
        module: left in training mode.
        samples: at least one.
        batch_size: samples of the batch.
    """
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(module.parameters()).device
    batch = samples.batch(torch.arange(min(batch_size, len(samples))))
    batch = tuple(None if part is None else map_tensors(part, lambda t: t.to(device)) for part in batch)
    module.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module.training_step(batch)
    except Exception:
        return 0
    return sum(seen.values())
