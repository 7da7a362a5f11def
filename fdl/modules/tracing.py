"""The mark of code that may be recorded once and replayed (``compile: traced``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

_Step = TypeVar("_Step", bound=Callable)


def traceable(step: _Step) -> _Step:
    """Mark a training step, a forward, or the class of an objective: executors may replay it instead of calling it.

    A step that has come often, of a model marked like that, is recorded as a list of tensor operations, forward and
    backward, and these are repeated from then on, where the recipe has ``compile: traced``. Mark only code that does
    the same operations every time: it reads its batch, the module's tensors and attributes of the module itself, and
    leaves nothing behind. What it reads elsewhere, such as in a settings object that the module holds, may change
    unseen; what it prints, counts or logs is not printed, counted or logged again.
    """
    step.traceable = True
    return step


_BUILT_IN = ("fdl", "lightning", "torch", "torchvision", "timm", "transformers", "peft")
"""Packages whose layers do the same operations every time, or draw random numbers, which is seen."""


def runs_traceable_code(kind: type[nn.Module]) -> bool:
    """Whether a class of modules computes with code that may be replayed.

    That is code of fdl and of the libraries that it builds models from, and `forward` and `training_step` that are
    marked `traceable`; a class that changes any other method must define and mark one of these.
    """
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] in (*_BUILT_IN, "builtins", "typing", "abc"):
            continue
        own = vars(cls)
        steps = [own[name] for name in ("forward", "training_step") if name in own]
        if not all(getattr(step, "traceable", False) for step in steps):
            return False
        if not steps and any(callable(value) or isinstance(value, property) for value in _overrides(own)):
            return False
    return True


def _overrides(own: Mapping[str, Any]) -> list[Any]:
    """What a class's body defines but for its constructor and what Python adds."""
    return [value for name, value in own.items() if name not in ("__init__", "__dict__", "__weakref__")]
