"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fdl.errors import UserError
from fdl.registry.kinds import KINDS
from fdl.registry.targets import find
from fdl.utils.suggest import suggest


def build_optimizer(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    target: str,
    args: Mapping[str, Any] | None = None,
    fused: bool = False,
) -> Optimizer:
    """Build an optimiser.

    Args:
        parameters: tensors or parameter groups.
        target: a class of ``torch.optim`` in lower case (``"sgd"``, ``"adamw"``, …) or a dotted path.
        args: further arguments of the optimiser.
        fused: use torch's fused kernel if one exists for these parameters, unless `args` choose an implementation. One
            fused Adam step of a small model on a CPU takes a third of the time.

    Raises:
        UserError: the optimiser is unknown, rejects its arguments, or needs a closure to step (L-BFGS).
    """
    args, parameters = args or {}, list(parameters)
    names = _resolve("optimizer", target)[1] or ()
    if fused and "fused" in names and not args.keys() & {"fused", "foreach", "differentiable"}:
        try:
            return _construct("optimizer", target, {**args, "fused": True}, parameters)
        except RuntimeError:
            pass  # torch has no fused kernel for the parameters' device or type
    return _construct("optimizer", target, args, parameters)


def build_scheduler(optimizer: Optimizer, target: str, args: Mapping[str, Any] | None = None) -> LRScheduler:
    """Build a learning-rate schedule.

    Args:
        optimizer: optimiser whose learning rates are scheduled.
        target: a class of ``torch.optim.lr_scheduler`` in snake case (``"cosine_annealing_lr"``, …) or a dotted path.
        args: further arguments of the schedule.

    Raises:
        UserError: the schedule is unknown, rejects its arguments, or needs a metric to step.
    """
    return _construct("scheduler", target, args or {}, optimizer)


def _construct(kind: str, target: str, args: Mapping[str, Any], first: Any) -> Any:
    make, names = _resolve(kind, target)
    if names is not None:
        for name in args:
            if name not in names:
                raise UserError(f"{kind} {target} takes no {name!r}{suggest(str(name), names)}")
    _check_numbers(kind, target, make, args)
    try:
        return make(first, **args)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{kind} {target} refuses its arguments: {error}") from error


def _check_numbers(kind: str, target: str, make: Callable[..., Any], args: Mapping[str, Any]) -> None:
    """Reject strings where numbers belong, and NaN: torch accepts some of these.

    Raises:
        UserError: an argument is not a valid number.
    """
    known = inspect.signature(make).parameters
    for name, value in args.items():
        default = known[name].default if name in known else None
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if (number or name in ("lr", "max_lr", "base_lr")) and isinstance(value, str):
            raise UserError(f"{kind} {target}: {name} must be a number, got the text {value!r}")
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, float) and math.isnan(one) for one in values):
            raise UserError(f"{kind} {target}: {name} must be a number, got {value!r}")
        if name == "lr" and isinstance(value, float) and math.isinf(value):
            raise UserError(f"{kind} {target}: lr must be finite, got {value!r}")


@cache
def _resolve(kind: str, target: str) -> tuple[Callable[..., Any], tuple[str, ...] | None]:
    """Return the class or function of a target, and the names of its arguments; None if it takes any."""
    make = find(target, KINDS[kind]).load()
    parameters = list(inspect.signature(make).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return make, None
    return make, tuple(p.name for p in parameters[1:])
