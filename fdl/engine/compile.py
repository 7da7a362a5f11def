"""Training steps through ``torch.compile``: compiled once, used over rounds and clients, or left as they are."""

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
    """Compiles objectives, once for every module and kind of objective.

    Clients fill one module after another with their weights, in place, and objectives that methods make anew in each
    round have the code of those before: both find the compiled step again, and the addresses that a CUDA graph
    remembers stay valid. A step is compiled whole or not at all, because what is left out between two parts, such as
    hooks, may be what a loss hangs on. Where that fails, a line of the log says why, and the step is run as it is.

    Args:
        backend: as ``torch.compile``'s.
    """

    def __init__(self, backend: str | Callable = "inductor"):
        self.backend = backend
        self._steps: WeakKeyDictionary[nn.Module, dict[tuple, Callable | None]] = WeakKeyDictionary()

    def run(self, use: Use, module: nn.Module, objective: Objective, mode: str) -> Mapping[str, Tensor]:
        """Do a pass with the compiled objective if there is one, otherwise with the objective itself.

        Args:
            use: the pass; it is repeated when it turns out that the objective cannot be compiled.
            module: what the objective is of; it has no gradients yet.
            objective: what to compile.
            mode: ``"none"``, or a mode of ``torch.compile``.

        Returns:
            What `use` returns. In mode ``"reduce-overhead"`` the next call overwrites it: add it up before.
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
    # torch keeps compiled versions with a function's code, a few at most: with code of its own, no module takes the
    # place of another's
    return FunctionType(_step.__code__.replace(), globals())


def _kind(objective: Objective) -> Any:
    """What objectives have in common that differ in the tensors and numbers that they hold."""
    function = getattr(objective, "__func__", objective)
    return getattr(function, "__code__", type(function))


def _failures() -> tuple[type[Exception], ...]:
    """What torch raises when it cannot compile, or has compiled for too many shapes."""
    from torch._dynamo import exc  # takes seconds to import

    limits = (getattr(exc, name, None) for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"))
    return exc.TorchDynamoException, *(limit for limit in limits if limit is not None)
