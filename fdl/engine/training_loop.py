"""The training loop: batches, one step per batch, a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdl.engine.batches import batches, gathered
from fdl.engine.inference import map_tensors, prefetch_to_device, to_device
from fdl.engine.optimizers import schedule_of, step_schedule
from fdl.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricOptimizer

    from fdl.datamodules.samples import Samples
    from fdl.modules.objectives import Objective
    from fdl.modules.types import Batch
    from fdl.recipe.config import Fit


class StepStrategy(Protocol):
    """Strategy of a training step: placement of a batch, forward, backward and update; see `EagerStep`."""

    fabric: Fabric
    module: nn.Module
    optimizer: _FabricOptimizer

    def place(self, batch: Batch, full: bool) -> Any:
        """Move a batch to the device; the result is the argument of `backward`."""

    def backward(self, placed: Any) -> Mapping[str, Tensor]:
        """Run a forward and a backward pass, and return the named losses."""

    def update(self) -> None:
        """Take an optimiser step, and drop the gradients."""

    def reduce_losses(self, means: dict[str, float]) -> dict[str, float]:
        """Combine the mean losses of all processes that share the fit."""


def train(
    step: StepStrategy,
    samples: Samples,
    config: Fit,
    generator: torch.Generator,
    round: int = 1,
    watch: Callable[[int], bool] | None = None,
) -> dict[str, float]:
    """Train a module on samples.

    Args:
        step: strategy of a step, with the module, the objective and the optimiser.
        samples: training samples, at least one.
        config: epochs or steps, batch size, schedule.
        generator: random stream of shuffles and augmentations.
        round: the current round, for schedules over rounds.
        watch: called after every step with the number of steps so far; True ends the fit.

    Returns:
        The mean over steps of every named loss.

    Raises:
        UserError: batch normalisation needs batches of at least two samples, and there is none.
    """
    module = step.module
    scheduler, interval = schedule_of(step.optimizer.optimizer, config, round)
    skip_single = len(samples) % config.batch_size == 1 and any(isinstance(m, _BatchNorm) for m in module.modules())
    set_training(module)
    drawn = gathered(samples, batches(len(samples), config, generator, skip_single), generator)
    sums: dict[str, Tensor] = {}
    steps = 0
    # on a GPU, gathering and copying the next batches overlap with the step on the current one
    for epoch_ended, batch in prefetch_to_device(
        step.fabric.device, lambda item: (item[0], step.place(item[2], len(item[1]) == config.batch_size)), drawn
    ):
        losses = step.backward(batch)
        step.update()
        for name, value in losses.items():
            value = value.detach()
            sums[name] = sums[name] + value if name in sums else value.clone()
        steps += 1
        if scheduler is not None and (interval == "step" or (interval == "epoch" and epoch_ended)):
            step_schedule(scheduler, config)
        if watch is not None:
            if watch(steps):
                break
            set_training(module)  # it may have predicted
    if steps == 0:
        raise UserError(
            f"{len(samples)} sample(s) in batches of {config.batch_size} leave no batch of two, which batch "
            "normalisation needs; use a module with group normalisation or give each client more samples"
        )
    return step.reduce_losses({name: float(value) / steps for name, value in sums.items()})


def set_training(module: nn.Module) -> None:
    """Put a module into training mode, if it is not: the walk over its parts costs as much as a small model's step."""
    if not module.training:
        module.train()


class EagerStep:
    """Forward, backward, clipping and optimiser step of one fit, with the objective called for every batch.

    Args:
        fabric: device and precision.
        module: the module to train, in place.
        parameters: its parameters that are trained.
        objective: loss to minimise.
        optimizer: optimiser of these parameters.
        gradient_clip: largest norm of a gradient; None: gradients are not clipped.
        plain: bypass Fabric's wrappers, which have no effect (one device, 32 bits) and cost small models time.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        objective: Objective,
        optimizer: _FabricOptimizer,
        gradient_clip: float | None,
        plain: bool,
    ):
        self.fabric = fabric
        self.module = module
        self.parameters = parameters
        self.objective = objective
        self.optimizer = optimizer
        self.gradient_clip = gradient_clip
        self.differentiate = Tensor.backward if plain else fabric.backward
        self._stepping = optimizer.optimizer if plain else optimizer

    def place(self, batch: Batch, full: bool) -> Any:
        """Move a batch to the device, in the recipe's precision.

        Args:
            batch: a batch in host memory.
            full: True if it has as many samples as the recipe's batch size.

        Returns:
            The argument of `backward`.
        """
        return self.fabric.strategy.precision.convert_input(batch_to_device(batch, self.fabric.device))

    def backward(self, placed: Any) -> Mapping[str, Tensor]:
        """Run a forward and a backward pass, which sets the parameters' gradients.

        Args:
            placed: the result of `place`.

        Returns:
            The named losses.
        """
        return self.gradients(self.objective, placed)

    def gradients(self, objective: Objective, placed: Any) -> Mapping[str, Tensor]:
        """Run a forward and a backward pass with another form of the step's objective, e.g. a compiled one.

        Args:
            objective: returns the same losses as the step's objective.
            placed: the result of `place`.

        Returns:
            The named losses.
        """
        with self.fabric.autocast():
            losses = objective(self.module, placed)
        self.differentiate(losses["loss"])
        return losses

    def update(self) -> None:
        """Clip the gradients, take an optimiser step, and drop the gradients."""
        if self.gradient_clip is not None:
            self.fabric.clip_gradients(
                self.module, self.optimizer, max_norm=self.gradient_clip, error_if_nonfinite=False
            )
        self._stepping.step()
        for parameter in self.parameters:
            parameter.grad = None

    def reduce_losses(self, means: dict[str, float]) -> dict[str, float]:
        """Combine the mean losses of all processes that share the fit.

        Args:
            means: the losses of this process.

        Returns:
            The losses of all processes.
        """
        return means


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device; to a GPU asynchronously.

    Args:
        batch: a batch in host memory.
        device: the device.
    """
    if device.type == "cpu":
        return batch
    return tuple(None if part is None else map_tensors(part, lambda t: to_device(t, device)) for part in batch)
