"""Models of one architecture stacked in memory, to train many of them in one vectorised pass (`torch.func.vmap`)."""

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


SMALL = {"cpu": 60_000, "cuda": 1_000_000}
"""Parameters up to which ``auto`` vectorises clients' training, by kind of device; on other devices it never does.

Vectorising saves the overhead of each operation, which matters for small models only. Measured on one core, 10 clients
with batches of 32: rounds take 0.5 to 0.7 of the time with perceptrons and convolutional networks of up to 50 000
parameters, as long at 170 000, and 1.3 times as long at 600 000, where the weights of all clients no longer fit into
the cache. The figure for GPUs is a conservative guess.
"""

_ALIGN = 16
"""Elements: rows are aligned like separate tensors, since sums over memory with another alignment round differently."""


def unstackable(module: nn.Module) -> str | None:
    """Return the reason why a model cannot be stacked; None if none is found.

    Obstacles that only appear when it is run, e.g. control flow that depends on data, are not found here.

    Args:
        module: a model of the architecture.
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
    """Copies of a template whose trained weights are the rows of one matrix; frozen weights are shared.

    Args:
        template: a module that is not `unstackable`.
        count: number of copies.

    Attributes:
        whole: the weights, float32 [count, P]; rows are padded with zeros.
        modules: the copies, whose weights are views of the rows.
        names: names of the trained weights, in order.
        grad: buffer of their gradients, of the same shape.
        optimizers: optimisers of the weights, kept for later fits.
        views: views of the weights, kept for later fits.
        recorder: traced steps of the stacked models.
    """

    def __init__(self, template: nn.Module, count: int):
        own = dict(template.named_parameters())
        shapes = {name: tuple(own[name].shape) for name in module_state(template)}
        self.names, self.shapes = list(shapes), [torch.Size(shape) for shape in shapes.values()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.whole = next(iter(own.values())).new_zeros(count, -(-sum(self.sizes) // _ALIGN) * _ALIGN)
        self.grad = torch.zeros_like(self.whole)
        self.optimizers: dict[str, tuple] = {}
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
        """View a matrix [K, P] as the stacked weights [K, …], in the order of `names`."""
        sizes = [*self.sizes, matrix.shape[1] - sum(self.sizes)]
        parts = zip(matrix.split(sizes, 1), self.shapes)
        return [part.unflatten(1, shape) if shape else part.squeeze(1) for part, shape in parts]

    def trained(self, row: int) -> list[nn.Parameter]:
        """Return the weights of one copy that were trainable when the stack was created."""
        return self._trained[row]

    def skeleton(self, training: bool) -> nn.Module:
        """Return the module that `together` calls for all copies, in training or evaluation mode."""
        if self._skeleton.training != training:
            self._skeleton.train(training)
        return self._skeleton

    def together(
        self, function: Callable[..., Any], weights: Sequence[Tensor], arguments: tuple[Any, ...], shared: bool = False
    ) -> Any:
        """Call a function of a module for several models at once.

        Args:
            function: called with the module and one model's arguments.
            weights: weights of K models, [K, …] each, from `pieces`.
            arguments: tensors, and tuples and lists of them; [K, …], or without K if `shared`.
            shared: the arguments are the same for all models.

        Returns:
            The function's result, every tensor with K as its first dimension.

        Raises:
            RuntimeError: the function cannot be vectorised.
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
    """Return x Wᵀ + b in operations that vmap does not decompose, which saves a tenth of a step."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y = torch.mm(rows, layer.weight.t())
    y = y if layer.bias is None else y + layer.bias
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], -1)


def activations(module: nn.Module, samples: Samples, batch_size: int) -> int:
    """Measure the bytes that a training step on one batch keeps for its backward pass.

    Args:
        module: the model; left in training mode.
        samples: at least one sample.
        batch_size: number of samples in the batch.

    Returns:
        The bytes; 0 if the module's own step fails on these samples.
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
