"""Optimisers and schedules of fits, of which hundreds follow each other on one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from fdl.errors import UserError
from fdl.modules.optim import build_optimizer, build_scheduler

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricOptimizer
    from torch.optim import Optimizer

    from fdl.engine.distributed.sharding import Sharder
    from fdl.recipe.config import Fit


class FitOptimizers:
    """One optimiser per module and settings, built once and reset for every fit.

    A shared module is trained for one client after another, and building an optimiser costs as much as half a step of a
    small model.

    Args:
        fabric: sets optimisers up.
        sharder: groups the parameters of sharded models; None if models are not sharded.
    """

    def __init__(self, fabric: Fabric, sharder: Sharder | None):
        self._fabric, self._sharder = fabric, sharder
        self._reusable: WeakKeyDictionary[nn.Module, dict[str, tuple]] = WeakKeyDictionary()

    def reusable(self) -> list[_FabricOptimizer]:
        """List the optimisers that are kept for later fits."""
        return [optimizer for kept in self._reusable.values() for _, optimizer, _ in kept.values()]

    def fresh(self, module: nn.Module, parameters: Sequence[nn.Parameter], config: Fit) -> _FabricOptimizer:
        """Return an optimiser that has taken no step yet.

        Args:
            module: the module to train.
            parameters: its parameters that are trained.
            config: its `optimizer` is used; one with a `scheduler` is always built anew.
        """
        reusable = self._reusable.setdefault(module, {})
        key = config.optimizer_key
        if (
            key in reusable and config.scheduler is None
        ):  # a schedule wraps its optimiser's methods, so it gets a new one
            before, optimizer, settings = reusable[key]
            if len(before) == len(parameters) and all(a is b for a, b in zip(before, parameters)):
                optimizer.state.clear()
                for group, original in zip(optimizer.param_groups, settings):
                    group.update(original)
                return optimizer
        # a fused kernel unscales gradients by itself, which clipping under 16-mixed cannot
        fused = self._fabric.strategy.precision.precision != "16-mixed" and self._sharder is None
        given = parameters if self._sharder is None else self._sharder.groups(parameters)
        optimizer = build_optimizer(given, config.optimizer.target, config.optimizer.args, fused)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer = self._fabric.setup_optimizers(optimizer)
        if config.scheduler is None:
            reusable[key] = parameters, optimizer, settings
        return optimizer


def build_fit_optimizer(parameters: Sequence[nn.Parameter], config: Fit) -> Optimizer:
    """Build the torch optimiser of a fit's settings.

    Args:
        parameters: the parameters to train.
        config: its `optimizer` is used.

    Raises:
        UserError: there is no such optimiser, or it refuses its arguments.
    """
    return build_optimizer(parameters, config.optimizer.target, config.optimizer.args)


def schedule_of(optimizer: Optimizer, config: Fit, round: int) -> tuple[Any, str]:
    """Build the schedule of a fit.

    Args:
        optimizer: the fit's optimiser.
        config: its `scheduler` is used.
        round: the current round, from 1; a schedule over rounds is advanced to it.

    Returns:
        The schedule, None if there is none, and the unit of its steps: ``"step"``, ``"epoch"`` or ``"round"``.
    """
    if config.scheduler is None:
        return None, "step"
    scheduler = build_scheduler(optimizer, config.scheduler.target, config.scheduler.args)
    if config.scheduler.interval == "round":
        for _ in range(round - 1):
            optimizer.step()  # without gradients nothing changes; torch warns without this call
            step_schedule(scheduler, config)
    return scheduler, config.scheduler.interval


def step_schedule(scheduler: Any, config: Fit) -> None:
    """Take one step of a schedule.

    Args:
        scheduler: the schedule.
        config: the fit's settings, named in the error.

    Raises:
        UserError: the schedule has ended before its fit.
    """
    try:
        scheduler.step()
    except ValueError as error:
        raise UserError(f"scheduler {config.scheduler.target} ends before its fit: {error}") from error
