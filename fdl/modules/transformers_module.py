"""Base class of language models and text classifiers of transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdl.modules.output import Output
from fdl.modules.trainer_hooks import TrainerHooks
from fdl.modules.tuning import keep_frozen_in_eval
from fdl.modules.types import TensorBatch


class TransformersModule(TrainerHooks):
    """LightningModule around a network of transformers, for a plain Trainer and for federated rounds.

    Args:
        network: model of transformers.
        frozen: names in the network's state that never change, as returned by `apply_tuning`.
        optimizer: ``{target, args}`` for a plain Trainer (see `build_optimizer`); default AdamW at 0.0005. Federated
            rounds use the recipe's ``local_training`` and ``server_distil`` settings instead.
        scheduler: ``{target, args, interval}`` for a plain Trainer (see `build_scheduler`).

    Attributes:
        frozen: names in the module's state that never change and are the same at every site.
    """

    network: nn.Module

    def __init__(
        self, network: nn.Module, frozen: frozenset[str], optimizer: dict | None = None, scheduler: dict | None = None
    ):
        super().__init__()
        self.network, self.frozen = network, frozenset(f"network.{name}" for name in frozen)
        self.optimizer_config = optimizer or {"target": "adamw", "args": {"lr": 5e-4}}
        self.scheduler_config = scheduler
        self.train()  # transformers loads models in evaluation mode

    def train(self, mode: bool = True) -> TransformersModule:
        """Switch to training or evaluation mode; frozen parts stay in evaluation mode.

        Args:
            mode: True for training mode.
        """
        super().train(mode)
        if mode and self.frozen:
            keep_frozen_in_eval(self.network)
        return self

    def test_step(self, batch: TensorBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the metrics of ``validation_step``."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: TensorBatch | Tensor, batch_idx: int = 0, dataloader_idx: int = 0) -> Output:
        """Predict a batch; labels are ignored."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: TensorBatch, batch_idx: int) -> None:
        """Log the training loss, under a Trainer."""
        self.log("train/loss", outputs["loss"], batch_size=len(batch[0]))

    def on_validation_batch_end(
        self, outputs: dict[str, Tensor], batch: TensorBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the validation metrics, under a Trainer; it averages them over the epoch."""
        self.log_dict({f"validation/{name}": value for name, value in outputs.items()}, batch_size=len(batch[0]))

    def on_test_batch_end(
        self, outputs: dict[str, Tensor], batch: TensorBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the test metrics, under a Trainer; it averages them over the epoch."""
        self.log_dict({f"test/{name}": value for name, value in outputs.items()}, batch_size=len(batch[0]))


def masked_mean(hidden: Tensor, real: Tensor) -> Tensor:
    """Average hidden states over the real tokens.

    Args:
        hidden: hidden states ``[B, T, D]``.
        real: bool ``[B, T]``, False at padding.

    Returns:
        ``[B, D]``; zeros for a row without real tokens.
    """
    share = real.to(hidden.dtype)
    return torch.einsum("btd,bt->bd", hidden, share) / share.sum(1, keepdim=True).clamp_min(1)
