"""What Lightning makes of the devices that a recipe asks for."""

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
"""What Lightning raises where this machine does not have what a recipe asks for."""


def fabric_of(
    accelerator: str, devices: int | str, num_nodes: int, strategy: str, precision: str, timeout: float
) -> Fabric:
    """Lightning's view of the devices, before any other process is there; arguments as in `Runtime`.

    Its DDP only brings the processes together: Fabric gets no model to wrap.
    """
    if strategy == "fsdp" or (strategy in ("auto", "ddp") and (str(devices) != "1" or num_nodes > 1)):
        strategy = DDPStrategy(timeout=timedelta(seconds=timeout))
    clusters.export_srun_variables()
    # Lightning takes tasks that Slurm has reserved for processes that it has started
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
    """See that a recipe which shards its models finds GPUs for it, before anything is loaded.

    Raises:
        UserError: this machine has none.
    """
    if recipe.fabric.strategy == "fsdp" and not torch.cuda.is_available():
        raise UserError(
            "fabric.strategy: fsdp shards models over GPUs, and torch finds none here; take fabric.strategy=auto or "
            "ddp, where every process has whole models"
        )
