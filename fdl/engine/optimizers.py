"""Optimisers and schedules of fits, which follow each other by the hundred on one template."""

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
    from fdl.recipe.config import Component, Fit


class FitOptimizers:
    """One optimiser per module and optimiser's settings, built once and emptied for every fit.

    A template is trained for one client after another, and building an optimiser costs as much as half a step of a
    small model.

    Args:
        fabric: sets them up.
        sharder: groups parameters that are spread over ranks; None where every rank has whole ones.
    """

    def __init__(self, fabric: Fabric, sharder: Sharder | None):
        self._fabric, self._sharder = fabric, sharder
        self._known: WeakKeyDictionary[nn.Module, dict[Component, tuple]] = WeakKeyDictionary()

    def known(self) -> list[_FabricOptimizer]:
        """Those that are used again."""
        return [optimizer for kept in self._known.values() for _, optimizer, _ in kept.values()]

    def fresh(self, module: nn.Module, parameters: Sequence[nn.Parameter], config: Fit) -> _FabricOptimizer:
        """An optimiser that has taken no step yet.

        Args:
            module: whose parameters they are.
            parameters: those that are trained.
            config: names the optimiser.
        """
        known = self._known.setdefault(module, {})
        key = config.optimizer
        if key in known and config.scheduler is None:  # a schedule wraps the optimiser's methods, so it gets a new one
            before, optimizer, settings = known[key]
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
            known[key] = parameters, optimizer, settings
        return optimizer


def build_fit_optimizer(parameters: Sequence[nn.Parameter], config: Fit) -> Optimizer:
    """The optimiser that a fit's settings name, as torch builds it.

    Raises:
        UserError: there is no such optimiser, or it refuses its arguments.
    """
    return build_optimizer(parameters, config.optimizer.target, config.optimizer.args)


def schedule_of(optimizer: Optimizer, config: Fit, round: int) -> tuple[Any, str]:
    """The schedule of a fit in a round, None where there is none, and what it counts."""
    if config.scheduler is None:
        return None, "step"
    scheduler = build_scheduler(optimizer, config.scheduler.target, config.scheduler.args)
    if config.scheduler.interval == "round":
        for _ in range(round - 1):
            optimizer.step()  # there are no gradients, so nothing moves; torch warns without it
            step_schedule(scheduler, config)
    return scheduler, config.scheduler.interval


def step_schedule(scheduler: Any, config: Fit) -> None:
    """Take one step of a schedule.

    Raises:
        UserError: the schedule has ended before its fit.
    """
    try:
        scheduler.step()
    except ValueError as error:
        raise UserError(f"scheduler {config.scheduler.target} ends before its fit: {error}") from error
