"""Steps that replay the traced operations of an earlier one (`fdl.engine.tracing.step_recorder`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fdl.engine.tracing.step_graph import Results
from fdl.engine.tracing.step_recorder import TracedSteps
from fdl.engine.training_loop import EagerStep
from fdl.modules.objectives import tensor_fields, training_step

TRACE_AFTER_STEPS = 100
"""Steps with the same shapes after which one is traced: the time saved exceeds the cost after 1,000 steps."""


class TracedStep(EagerStep):
    """A step that is replayed without its Python code once it is frequent; only for objectives marked `traceable`.

    Args:
        traces: traced steps of this module and kind of objective.
        eager: the arguments of `EagerStep`.
    """

    def __init__(self, traces: TracedSteps, *eager: Any):
        super().__init__(*eager)
        self._traces, self._constants, self._spec = traces, [], None
        if self.objective is not training_step:
            self._constants, self._spec = tree_flatten(tensor_fields(self.objective))

    def backward(self, placed: Any) -> Mapping[str, Tensor]:
        """Run a forward and a backward pass, traced or eager, with the same results to the bit.

        Args:
            placed: the result of `place`.

        Returns:
            The named losses.
        """
        if not all(part is None or isinstance(part, Tensor) for part in placed):
            return self.gradients(self.objective, placed)
        missing = tuple(part is None for part in placed)

        def eager() -> Results:
            losses = self.gradients(self.objective, placed)
            return dict(losses), [parameter.grad for parameter in self.parameters]

        def step(*tensors: Tensor) -> Results:
            rest = iter(tensors)
            batch = tuple(None if gone else next(rest) for gone in missing)
            objective = self.objective
            if self._constants:
                objective = dataclasses.replace(objective, **tree_unflatten(list(rest), self._spec))
            losses = objective(self.module, batch)
            gradients = torch.autograd.grad(losses["loss"], self.parameters)
            return {name: value.detach() for name, value in losses.items()}, list(gradients)

        tensors = [*(part for part in placed if part is not None), *self._constants]
        losses, gradients = self._traces.run(eager, step, tensors, missing, self.module)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        return losses
