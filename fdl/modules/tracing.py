"""Mark of code that may be traced once and replayed (``compile: traced``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

_Step = TypeVar("_Step", bound=Callable)


def traceable(step: _Step) -> _Step:
    """Mark a training step, a forward method or an objective class as replayable.

    With ``compile: traced`` in the recipe, a step that is repeated often is traced into a list of tensor operations,
    forward and backward, which is replayed from then on instead of calling the step. Mark only code that performs the
    same operations every time: it reads its batch, the module's tensors and attributes of the module itself, and has no
    side effects. Changes of state held elsewhere, e.g. in a settings object that the module refers to, are not noticed;
    printing, counting and logging are not replayed.

    Args:
        step: function or class; returned unchanged, with the attribute ``traceable``.
    """
    step.traceable = True
    return step


_BUILT_IN = ("fdl", "lightning", "torch", "torchvision", "timm", "transformers", "peft")
"""Packages whose layers perform the same operations every time, or draw random numbers, which tracing detects."""


def runs_traceable_code(kind: type[nn.Module]) -> bool:
    """Return True if a module class consists of code that may be replayed.

    That is code of fdl and of the libraries that it builds models from, and `forward` and `training_step` methods that
    are marked `traceable`. A class that overrides any other method must define and mark one of these two.

    Args:
        kind: class of the module.
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
    """List the definitions in a class body, except its constructor and the entries that Python adds."""
    return [value for name, value in own.items() if name not in ("__init__", "__dict__", "__weakref__")]
