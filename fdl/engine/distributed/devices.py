"""Lightning's Fabric for the devices of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fdl.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fdl.recipe.config import Recipe


from datetime import timedelta

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fdl.engine.distributed import launch_environment as clusters

NO_SUCH_DEVICES = (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError)
"""Errors that Lightning raises if this machine lacks a recipe's devices."""


def fabric_of(
    accelerator: str, devices: int | str, num_nodes: int, strategy: str, precision: str, timeout: float
) -> Fabric:
    """Create a Fabric for a run's devices, not launched yet.

    Its DDP strategy only connects the processes: no model is wrapped.

    Args:
        accelerator: Lightning's accelerator, e.g. ``"auto"``, ``"cpu"``, ``"gpu"``.
        devices: number of devices per machine.
        num_nodes: number of machines.
        strategy: ``"auto"``, ``"ddp"`` or ``"fsdp"``, or another strategy of Lightning's.
        precision: Lightning's precision, e.g. ``"32-true"`` or ``"bf16-mixed"``.
        timeout: seconds that a process waits for the others of the run.
    """
    if strategy == "fsdp" or (strategy in ("auto", "ddp") and (str(devices) != "1" or num_nodes > 1)):
        strategy = DDPStrategy(timeout=timedelta(seconds=timeout))
    clusters.export_srun_variables()
    # Lightning mistakes the tasks of a Slurm allocation for processes that srun has started
    plugins = [LightningEnvironment()] if clusters.inside_allocation() else None
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        plugins=plugins,
    )


def require_gpus(recipe: Recipe) -> None:
    """Check that a recipe that shards its models has GPUs, before anything is loaded.

    Args:
        recipe: the recipe.

    Raises:
        UserError: this machine has no GPU.
    """
    if recipe.fabric.strategy == "fsdp" and not torch.cuda.is_available():
        raise UserError(
            "fabric.strategy: fsdp shards models over GPUs, and torch finds none here; take fabric.strategy=auto or "
            "ddp, where every process has whole models"
        )
