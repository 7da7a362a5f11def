"""The training of several clients in one pass: what `Runtime.fit` does for one, step by step for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fdl.engine.batches import batches, gathered
from fdl.engine.inference import OutputSelector, map_tensors, predict
from fdl.engine.optimizers import schedule_of
from fdl.engine.runtime import Runtime
from fdl.engine.tracing.step_graph import Results
from fdl.engine.vectorized.stack_batches import stacked
from fdl.modules.objectives import Objective, is_padding_safe, kind_of, marked_step, tensor_fields
from fdl.modules.optim import build_optimizer
from fdl.recipe.learning_rates import alike_but_for_rates

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.engine.vectorized.stacked_models import StackedModels
    from fdl.modules.types import Batch
    from fdl.recipe.config import Fit

_ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop")
"""Optimisers that treat every weight by itself, so that it does not matter which weights share a tensor."""


TRACE_STACKED_AFTER_STEPS = 10
"""Steps with the same shapes after which one is traced: the time saved exceeds the cost after 200 steps."""


class NotVectorizableError(Exception):
    """Jobs that cannot be done in one pass; nothing has been changed but the jobs' streams."""


@dataclass(eq=False)
class StackedFit:
    """One client's call of `Runtime.fit`; arguments as there.

    Args:
        stack: the models of its architecture.
        row: its model's place among them.

    Attributes:
        an_epoch: steps of an epoch.
        steps: in all.
    """

    stack: StackedModels
    row: int
    samples: Samples
    config: Fit
    generator: torch.Generator
    objective: Objective
    round: int

    def alike(self, other: Any) -> bool:
        """Return True if one pass can serve both."""
        return (
            isinstance(other, StackedFit)
            and self.stack is other.stack
            and alike_but_for_rates(self.config, other.config)
            and self.round == other.round
            and kind_of(self.objective) == kind_of(other.objective)
        )

    def __post_init__(self) -> None:
        """Count once what is asked often."""
        self.an_epoch = -(-len(self.samples) // self.config.batch_size)
        self.steps = self.config.steps if self.config.steps is not None else self.config.epochs * self.an_epoch


@dataclass(eq=False)
class StackedPredict:
    """One client's call of `Runtime.predict`; arguments as there and in `StackedFit`."""

    stack: StackedModels
    row: int
    samples: Samples
    what: OutputSelector

    def alike(self, other: Any) -> bool:
        """Return True if one pass can serve both: the same output of the same samples."""
        same = isinstance(other, StackedPredict) and self.stack is other.stack and self.samples is other.samples
        return same and self.what == other.what


def answer_together(runtime: Runtime, jobs: Sequence[StackedPredict]) -> list[Tensor]:
    """Ask several models the same.

    Returns:
        Their answers in order, float32 [n, …] on the CPU.

    Raises:
        NotVectorizableError: the question cannot be vectorised.
    """
    stack, what = jobs[0].stack, jobs[0].what
    rows, identity = _rows(jobs)
    weights = stack.pieces(stack.whole[: len(rows)] if identity else stack.whole[rows])
    ask = (lambda module, inputs: getattr(module(inputs), what)) if isinstance(what, str) else what
    stack.skeleton(training=False)

    def question(_: nn.Module, inputs: Any) -> Tensor:
        return stack.together(ask, weights, (inputs,), shared=True).transpose(0, 1)

    size = max(runtime.batch_size // len(jobs), 1)  # as many activations as one model has in a pass
    try:
        with runtime.clock.part("extraction", within="clients"):
            answers = predict(runtime.fabric, stack.skeleton(training=False), jobs[0].samples, question, size)
    except Exception as error:
        raise NotVectorizableError(_first_line(error)) from error
    return list(answers.transpose(0, 1).contiguous())


def fit_together(runtime: Runtime, jobs: Sequence[StackedFit]) -> list[dict[str, float]]:
    """Train several models.

    Every model sees the batches that it would see alone. At any time those that still train are the first rows of a
    matrix, on which one optimiser works: a model that is done, and its moments, are outside of it.

    Args:
        runtime: where.
        jobs: alike.

    Returns:
        For each job the mean over its steps of every named loss.

    Raises:
        NotVectorizableError: the fit cannot be vectorised.
    """
    stack, config = jobs[0].stack, jobs[0].config
    if config.scheduler is not None and config.scheduler.interval == "epoch" and len({j.an_epoch for j in jobs}) > 1:
        raise NotVectorizableError("its schedule counts epochs, which differ in length")
    ordered = sorted(jobs, key=lambda job: -job.steps)
    rows, identity = _rows(ordered)
    whole = stack.whole[: len(rows)] if identity else stack.whole[rows]
    loss = _Loss(stack, ordered)
    parameters, optimizer = _optimizer(stack, whole, [job.config for job in ordered])
    scheduler, interval = schedule_of(optimizer, config, jobs[0].round)

    live, sums = 0, {}
    streams = [
        gathered(job.samples, batches(len(job.samples), config, job.generator), job.generator) for job in ordered
    ]
    for step in range(ordered[0].steps):
        if live == 0 or ordered[live - 1].steps <= step:
            live = sum(job.steps > step for job in ordered)
            gradient, weights, gradients = _views(stack, whole, live)
            _shorten(optimizer, parameters, whole, gradient)
        drawn = [next(stream) for stream in streams[:live]]
        try:
            losses = loss(runtime, weights, gradients, [batch for _, _, batch in drawn])
        except Exception as error:
            if step == 0:
                raise NotVectorizableError(_first_line(error)) from error
            raise
        if config.gradient_clip is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((config.gradient_clip / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        for name, value in losses.items():
            if name in sums:
                sums[name][:live] += value
            else:
                sums[name] = value.clone()
        if scheduler is not None and (interval == "step" or (interval == "epoch" and drawn[0][0])):
            scheduler.step()
    if not identity:
        stack.whole[rows] = whole
    table = torch.stack(list(sums.values())).tolist()  # the one time that the device is waited for
    means = {job: {name: column[i] / job.steps for name, column in zip(sums, table)} for i, job in enumerate(ordered)}
    return [means[job] for job in jobs]


class _Loss:
    """The losses of all models in a step, and their gradients."""

    def __init__(self, stack: StackedModels, jobs: Sequence[StackedFit]):
        self.stack = stack
        self.module = stack.skeleton(training=True)
        first = jobs[0].objective
        self.objective, self.own = first, None
        if dataclasses.is_dataclass(first):
            own = [tensor_fields(job.objective) for job in jobs]
            self.own = {key: _stack([tensors[key] for tensors in own]) for key in own[0]}
            self.objective = lambda module, batch, own: dataclasses.replace(first, **own)(module, batch)
        self.pads = is_padding_safe(marked_step(self.module, first))
        traced = jobs[0].config.compile == "traced"
        self.recordings = stack.recorder.begin(self.module, first, TRACE_STACKED_AFTER_STEPS) if traced else None

    def __call__(
        self, runtime: Runtime, weights: list[Tensor], gradients: list[Tensor], parts: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Write the gradients of all models, and return their losses, [K] each."""
        groups: dict[Any, list[int]] = {}
        for i, part in enumerate(parts):
            groups.setdefault(_form(part, self.pads), []).append(i)
        if len(groups) == 1:
            return self._pass(runtime, weights, gradients, parts, slice(0, len(parts)))
        # where an objective does not know of padding, batches of one size make one pass
        result: dict[str, Tensor] = {}
        for members in groups.values():
            some = [weight.detach()[members].requires_grad_() for weight in weights]
            wanted = [torch.empty_like(weight) for weight in some]
            losses = self._pass(runtime, some, wanted, [parts[i] for i in members], members)
            for target, source in zip(gradients, wanted):
                target[members] = source
            for name, value in losses.items():
                result.setdefault(name, value.new_zeros(len(parts)))[members] = value
        return result

    def _pass(
        self,
        runtime: Runtime,
        weights: list[Tensor],
        gradients: list[Tensor],
        parts: Sequence[Batch],
        members: slice | list[int],
    ) -> dict[str, Tensor]:
        batch = tuple(None if p is None else map_tensors(p, lambda t: t.to(runtime.device)) for p in stacked(parts))
        own = () if self.own is None else ({key: _take(value, members) for key, value in self.own.items()},)
        leaves, form = tree_flatten((batch, *own))

        def step(*tensors: Tensor) -> Results:
            weights, leaves = tensors[:count], tensors[count:]
            losses = self.stack.together(self.objective, weights, tree_unflatten(leaves, form))
            found = torch.autograd.grad(losses["loss"].sum(), weights, allow_unused=True)
            if any(gradient is None for gradient in found):
                raise ValueError("its loss leaves out some of its weights")
            return {name: value.detach() for name, value in losses.items()}, list(found)

        count = len(weights)
        tensors = [*weights, *leaves]
        if self.recordings is None:
            losses, found = step(*tensors)
        else:
            losses, found = self.recordings.run(lambda: step(*tensors), step, tensors, form, self.module)
        torch._foreach_copy_(gradients, found)
        return losses


def _optimizer(
    stack: StackedModels, whole: Tensor, configs: Sequence[Fit]
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """A fresh optimiser of all weights, which are one parameter, or one a row where learning rates differ.

    As in `Runtime.fit`, it is built once and emptied: for one parameter; a group for each client is built anew.
    """
    config = configs[0]
    known = stack.optimizers.get(config.optimizer_key) if config.scheduler is None else None
    alike = all(other is config or other == config for other in configs)
    if known is not None and alike:
        parameter, optimizer, settings = known
        optimizer.state.clear()
        optimizer.param_groups[0].update(settings)
        parameter.data = whole
        return [parameter], optimizer
    if alike:
        parameters = groups = [nn.Parameter(whole)]
    else:
        parameters = [nn.Parameter(row) for row in whole]
        groups = [
            {"params": [row]} | {name: value for name, value in own.optimizer.args.items() if name == "lr"}
            for row, own in zip(parameters, configs)
        ]
    optimizer = build_optimizer(groups, config.optimizer.target, config.optimizer.args, fused=True)
    if type(optimizer).__module__.partition(".")[0] != "torch" or type(optimizer).__name__ not in _ELEMENTWISE:
        raise NotVectorizableError(f"{config.optimizer.target} looks at whole tensors")
    if alike and config.scheduler is None:  # a schedule wraps the optimiser's methods: such a one is not used again
        settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        stack.optimizers[config.optimizer_key] = parameters[0], optimizer, settings
    return parameters, optimizer


def _views(stack: StackedModels, whole: Tensor, live: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The first rows' gradients as one matrix, their weights by name as leaves of a graph, and gradients by name."""
    own = whole.data_ptr() == stack.whole.data_ptr()
    if own and live in stack.views:
        return stack.views[live]
    gradient = stack.grad[:live]
    weights = [piece.requires_grad_() for piece in stack.pieces(whole[:live].detach())]
    found = gradient, weights, stack.pieces(gradient)
    if own:
        stack.views[live] = found
    return found


def _shorten(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], whole: Tensor, gradient: Tensor
) -> None:
    """Let the optimiser see the first rows only, those that there is a gradient of, with their moments."""
    if len(parameters) > 1:
        for place, parameter in enumerate(parameters):  # torch's optimisers pass over what has no gradient
            parameter.grad = gradient[place] if place < len(gradient) else None
        return
    parameter, live = parameters[0], len(gradient)
    before = parameter.shape
    parameter.grad = None
    parameter.data = whole[:live]
    for name, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
        if isinstance(value, Tensor) and value.shape == before:
            optimizer.state[parameter][name] = value[:live]
    parameter.grad = gradient


def _rows(jobs: Sequence[StackedFit | StackedPredict]) -> tuple[list[int], bool]:
    """Rows of the jobs' models, and whether these are the first rows in order."""
    rows = [job.row for job in jobs]
    return rows, rows == list(range(len(rows)))


def _stack(values: Sequence[Any]) -> Any:
    return torch.stack(list(values)) if isinstance(values[0], Tensor) else [torch.stack(v) for v in zip(*values)]


def _take(value: Any, members: slice | list[int]) -> Any:
    return value[members] if isinstance(value, Tensor) else [part[members] for part in value]


def _form(batch: Batch, pads: bool) -> Any:
    """Shapes that batches in one pass have in common."""

    def shape(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, tuple):
            return tuple(shape(some) for some in part)
        text = part.ndim == 2 and not part.is_floating_point()
        return (len(part), "text") if text else tuple(part.shape)

    labels = batch[1]
    if pads and len(batch) == 2 and isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
        inputs = batch[0]
        return inputs.ndim if isinstance(inputs, Tensor) else "several"
    return tuple(shape(part) for part in batch)


def _first_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


Together = Callable[[Runtime, Sequence[Any]], list[Any]]
TOGETHER: dict[type, Together] = {StackedFit: fit_together, StackedPredict: answer_together}
