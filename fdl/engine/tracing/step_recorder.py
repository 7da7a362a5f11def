"""Training steps written down once as plain tensor operations, and repeated without the machinery that found them.

Modules, `torch.func.vmap` and autograd work out a step's operations anew each time. For small models that takes as long
as the operations, which are the same every time where no step depends on numbers in tensors, on random numbers, or on
what happened before. Only such steps are written down, and the first repetition must give the same to the bit.
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

_WANTS = attrgetter("requires_grad")

MAX_SHAPES = 16
"""Forms of one objective that are kept."""

MAX_OBJECTIVES = 8
"""Objectives whose steps are kept; the oldest is forgotten first."""


class StepTracer:
    """The steps of one module that have been written down, for several kinds of objectives."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Any, TracedSteps]] = []
        self._dicts: list[dict] = []
        self._hooks: list[dict] = []
        self._settings: list[Any] = []
        self._tensors: list[Tensor] = []
        self._wanted: list[bool] = []
        self._traceable = False

    def begin(self, module: nn.Module, objective: Objective, uses: int) -> TracedSteps | None:
        """A fit begins.

        What was written down is forgotten when anything about the module has been set otherwise since.

        Args:
            module: always the same, in training mode.
            objective: what the fit minimises.
            uses: steps of one form after which it is written down, if they came in more than one fit: what is new
                in every fit, such as an objective that holds another number each round, is never worth it.

        Returns:
            The steps of such objectives; None where the objective or a part of the module is not marked `traceable`,
            the objective is not repeatable, or there are hooks.
        """
        self._reset_if_changed(module)
        if (
            not self._traceable
            or any(self._hooks)
            or not (is_traceable(module, objective) and is_repeatable(objective))
        ):
            return None
        kind = kind_of(objective)
        found = next((recordings for known, recordings in self._kinds if known == kind), None)
        if found is None:
            found = TracedSteps(uses)
            self._kinds = [*self._kinds[1 - MAX_OBJECTIVES :], (kind, found)]
        found.fits += 1
        return found

    def _reset_if_changed(self, module: nn.Module) -> None:
        """Forget all when the module has other parts, tensors or attributes than before."""
        settings = [*chain.from_iterable(map(dict.values, self._dicts))]
        # the same objects: comparing them could mean comparing tensors
        same = settings and len(settings) == len(self._settings) and all(map(is_, settings, self._settings))
        if same and [*map(_WANTS, self._tensors)] == self._wanted:
            return
        parts = list(module.modules())
        self._kinds.clear()
        self._traceable = all(map(runs_traceable_code, {type(part) for part in parts}))
        self._dicts = [d for p in parts for d in (p.__dict__, p._modules, p._parameters, p._buffers)]
        self._hooks = [d for p in parts for name, d in p.__dict__.items() if name.endswith("_hooks")]
        self._settings = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._tensors = [value for value in self._settings if isinstance(value, Tensor)]
        self._wanted = [*map(_WANTS, self._tensors)]


class TracedSteps:
    """The steps of one module and one kind of objective, by the form of what they are given.

    Args:
        uses: as in `StepTracer.begin`.

    Attributes:
        fits: that have begun.
    """

    def __init__(self, uses: int) -> None:
        self.fits = 0
        self._needed = uses
        self._steps: dict[Any, StepFunction | None] = {}
        self._uses: dict[Any, tuple[int, int]] = {}

    def run(
        self, eager: Callable[[], Results], step: StepFunction, tensors: Sequence[Tensor], more: Any, module: nn.Module
    ) -> Results:
        """Take a step, as it was written down if it was; and write it down if it comes often.

        Args:
            eager: takes the step.
            step: the same, given tensors; further arguments as in `trace_step`.
            tensors: what the step is given.
            more: whatever else makes it another step than one with tensors of the same shapes.
            module: whose tensors it may read besides.

        Returns:
            What `eager` returns, or would, to the bit.
        """
        form = more, *[(tensor.shape, tensor.dtype) for tensor in tensors]
        known = self._steps.get(form)
        if known is not None:
            return known(*tensors)
        results = eager()
        if self._is_frequent(form):
            self._steps[form] = trace_step(step, tensors, results, [*module.parameters(), *module.buffers()])
        return results

    def _is_frequent(self, form: Any) -> bool:
        """Count a use; whether it is time to write the form down."""
        if form in self._steps or len(self._steps) >= MAX_SHAPES:
            return False
        uses, first = self._uses.get(form, (0, self.fits))
        self._uses[form] = uses + 1, first
        return uses + 1 >= self._needed and self.fits > first
