"""Training steps traced once as plain tensor operations, and replayed without the overhead of Python and autograd.

Modules, `torch.func.vmap` and autograd derive a step's operations again each time. For small models that takes as long
as the operations, which are the same every time if a step does not depend on values of tensors, on random numbers, or
on earlier steps. Only such steps are traced, and the first replay must give the same results to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from fdl.engine.tracing.step_graph import Results, StepFunction, trace_step
from fdl.modules.objectives import Objective, is_repeatable, is_traceable, kind_of
from fdl.modules.tracing import runs_traceable_code

_REQUIRES_GRAD = attrgetter("requires_grad")

MAX_SHAPES = 16
"""Traced steps kept per objective, which differ in the shapes of their tensors."""

MAX_OBJECTIVES = 8
"""Objectives whose traced steps are kept; the oldest is dropped first."""


class StepTracer:
    """The traced steps of one module, for several kinds of objectives."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Any, TracedSteps]] = []
        self._dicts: list[dict] = []
        self._hooks: list[dict] = []
        self._settings: list[Any] = []
        self._tensors: list[Tensor] = []
        self._require_grad: list[bool] = []
        self._traceable = False

    def begin(self, module: nn.Module, objective: Objective, uses: int) -> TracedSteps | None:
        """Begin a fit, and return the traced steps for its objective.

        Traced steps are dropped if any attribute of the module has been set since the last fit.

        Args:
            module: the same module at every call, in training mode.
            objective: the loss that the fit minimises.
            uses: steps with the same shapes after which one is traced, if they occurred in more than one fit: steps
                that are new in every fit, e.g. of an objective with another constant each round, are not worth it.

        Returns:
            The traced steps of this kind of objective; None if the objective or a part of the module is not marked
            `traceable`, the objective is not repeatable, or the module has hooks.
        """
        self._reset_if_changed(module)
        if (
            not self._traceable
            or any(self._hooks)
            or not (is_traceable(module, objective) and is_repeatable(objective))
        ):
            return None
        kind = kind_of(objective)
        found = next((steps for other, steps in self._kinds if other == kind), None)
        if found is None:
            found = TracedSteps(uses)
            self._kinds = [*self._kinds[1 - MAX_OBJECTIVES :], (kind, found)]
        found.fits += 1
        return found

    def _reset_if_changed(self, module: nn.Module) -> None:
        """Drop all traced steps if the module has other parts, tensors or attributes than before."""
        settings = [*chain.from_iterable(map(dict.values, self._dicts))]
        # compared by identity: equality would compare the elements of tensors
        same = settings and len(settings) == len(self._settings) and all(map(is_, settings, self._settings))
        if same and [*map(_REQUIRES_GRAD, self._tensors)] == self._require_grad:
            return
        parts = list(module.modules())
        self._kinds.clear()
        self._traceable = all(map(runs_traceable_code, {type(part) for part in parts}))
        self._dicts = [d for p in parts for d in (p.__dict__, p._modules, p._parameters, p._buffers)]
        self._hooks = [d for p in parts for name, d in p.__dict__.items() if name.endswith("_hooks")]
        self._settings = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._tensors = [value for value in self._settings if isinstance(value, Tensor)]
        self._require_grad = [*map(_REQUIRES_GRAD, self._tensors)]


class TracedSteps:
    """The traced steps of one module and one kind of objective, by the shapes and types of their tensors.

    Args:
        uses: steps with the same shapes after which one is traced, if they occurred in more than one fit.

    Attributes:
        fits: number of fits that have begun.
    """

    def __init__(self, uses: int) -> None:
        self.fits = 0
        self._needed = uses
        self._steps: dict[Any, StepFunction | None] = {}
        self._uses: dict[Any, tuple[int, int]] = {}

    def run(
        self, eager: Callable[[], Results], step: StepFunction, tensors: Sequence[Tensor], more: Any, module: nn.Module
    ) -> Results:
        """Run a step, traced if it has been traced; and trace it if it is frequent.

        Args:
            eager: runs the step.
            step: the same step as a function of tensors, for `trace_step`.
            tensors: the arguments of `step`.
            more: hashable settings that distinguish this step from others with tensors of the same shapes.
            module: the module whose tensors the step may read besides.

        Returns:
            The results of `eager`, to the bit.
        """
        form = more, *[(tensor.shape, tensor.dtype) for tensor in tensors]
        traced = self._steps.get(form)
        if traced is not None:
            return traced(*tensors)
        results = eager()
        if self._is_frequent(form):
            self._steps[form] = trace_step(step, tensors, results, [*module.parameters(), *module.buffers()])
        return results

    def _is_frequent(self, form: Any) -> bool:
        """Count a use of a form that is not traced yet; return True if it is due for tracing."""
        if form in self._steps or len(self._steps) >= MAX_SHAPES:
            return False
        uses, first = self._uses.get(form, (0, self.fits))
        self._uses[form] = uses + 1, first
        return uses + 1 >= self._needed and self.fits > first
