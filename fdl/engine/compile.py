"""Training steps with ``torch.compile``: compiled once and reused over rounds and clients, with an eager fallback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fdl.modules.objectives import Objective

log = logging.getLogger("fdl")

Use = Callable[["Objective"], Mapping[str, Tensor]]
"""One forward and backward pass of an objective."""


class Compiler:
    """Compiles objectives, once per module and kind of objective.

    Clients load their weights into one shared module, in place, and the objectives that methods build in each round
    share their code with earlier ones: both reuse the compiled step, and the addresses that a CUDA graph has recorded
    stay valid. A step is compiled as one graph or not at all, because a graph break may skip what a loss depends on,
    such as hooks. If that fails, the reason is logged and the step is run eagerly.

    Args:
        backend: a backend of ``torch.compile``.
    """

    def __init__(self, backend: str | Callable = "inductor"):
        self.backend = backend
        self._steps: WeakKeyDictionary[nn.Module, dict[tuple, Callable | None]] = WeakKeyDictionary()

    def run(self, use: Use, module: nn.Module, objective: Objective, mode: str) -> Mapping[str, Tensor]:
        """Run a forward and backward pass with the compiled objective, or with the objective itself if that fails.

        Args:
            use: runs the pass with an objective; repeated if the objective turns out not to compile.
            module: the module to train, without gradients.
            objective: the objective to compile.
            mode: ``"none"``, or a mode of ``torch.compile``.

        Returns:
            The result of `use`. In mode ``"reduce-overhead"`` the next call overwrites it: accumulate it before.
        """
        if mode == "none":
            return use(objective)
        steps = self._steps.setdefault(module, {})
        key = mode, _kind(objective)
        if key not in steps:
            steps[key] = torch.compile(_new_step(), fullgraph=True, backend=self.backend, mode=mode)
        if steps[key] is None:
            return use(objective)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return use(partial(steps[key], objective))
        except _failures() as error:
            steps[key] = None
            reason = " ".join(str(error).split())[:300]
            log.warning("%s is trained without torch.compile, which fails: %s", type(module).__name__, reason)
            for parameter in module.parameters():
                parameter.grad = None
            return use(objective)


def _step(objective: Objective, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    return objective(module, batch)


def _new_step() -> Callable:
    # torch keeps a few compiled versions per code object: with a code object of its own, no module evicts another's
    return FunctionType(_step.__code__.replace(), globals())


def _kind(objective: Objective) -> Any:
    """Return a key that objectives share if they differ only in the tensors and numbers that they hold."""
    function = getattr(objective, "__func__", objective)
    return getattr(function, "__code__", type(function))


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors that torch raises if it cannot compile, or has compiled for too many shapes."""
    from torch._dynamo import exc  # takes seconds to import

    limits = (getattr(exc, name, None) for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"))
    return exc.TorchDynamoException, *(limit for limit in limits if limit is not None)
