"""Optimiser configuration for a plain Trainer; federated rounds never call it."""

from __future__ import annotations

from typing import Any

from fdl.modules.base import FederatedModule
from fdl.modules.optim import build_optimizer, build_scheduler


class TrainerHooks(FederatedModule):
    """Module that builds its configured optimiser and schedule for a plain Trainer.

    Attributes:
        optimizer_config: ``{target, args}``, see `build_optimizer`.
        scheduler_config: ``{target, args, interval}``, see `build_scheduler`; None for no schedule.
    """

    optimizer_config: dict
    scheduler_config: dict | None

    def configure_optimizers(self) -> Any:
        """Build the optimiser and the schedule for a plain Trainer."""
        optimizer = build_optimizer(
            [p for p in self.parameters() if p.requires_grad],
            self.optimizer_config["target"],
            self.optimizer_config.get("args"),
        )
        if self.scheduler_config is None:
            return optimizer
        scheduler = build_scheduler(optimizer, self.scheduler_config["target"], self.scheduler_config.get("args"))
        interval = self.scheduler_config.get("interval", "epoch")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}
