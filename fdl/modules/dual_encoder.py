"""Base class of dual encoders: an image tower and a text tower with a shared embedding space."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.losses.contrastive import MAX_SCALE, clamp_scale, gathered_info_nce, info_nce, logits_between, sigmoid_loss
from fdl.modules.features import capture
from fdl.modules.output import Output
from fdl.modules.tracing import traceable
from fdl.modules.trainer_hooks import TrainerHooks

Pairs = tuple[Tensor, Tensor]
"""Images float32 [B, C, H, W] and their texts int64 [B, T], padded on the right with -1."""

_FIRST_SCALE = {"contrastive": 1 / 0.07, "sigmoid": 10.0}
_FIRST_BIAS = -10.0


class DualEncoder(TrainerHooks, ABC):
    """Contrastive training of an image tower and a text tower, for a plain Trainer and for federated rounds.

    Subclasses implement `image_vectors` and `text_vectors`, whose results need not be normalised.

    Args:
        loss: ``"contrastive"`` is CLIP's loss, which contrasts each pair with all others of its batch; ``"sigmoid"`` is
            SigLIP's, which classifies every combination of image and text independently, with a learned bias.
        optimizer: ``{target, args}`` for a plain Trainer (see `build_optimizer`); default AdamW at 0.001. Federated
            rounds use the recipe's ``local_training`` and ``server_distil`` settings instead.
        scheduler: ``{target, args, interval}`` for a plain Trainer (see `build_scheduler`).

    Attributes:
        backbone: both towers.
        logit_scale: logarithm of the factor by which cosines are multiplied, a parameter.
        logit_bias: bias added to the scaled cosines, a parameter; None unless the loss is ``"sigmoid"``.
        embedding_dim: D, width of the shared space.
        gather: contrast the pairs of all ranks in each step. A plain Trainer that trains this module on several devices
            turns it on; it stays off if ranks train different clients.
    """

    backbone: nn.Module
    embedding_dim: int

    def __init__(
        self,
        loss: Literal["contrastive", "sigmoid"] = "contrastive",
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        super().__init__()
        if loss not in _FIRST_SCALE:
            raise UserError(f"loss must be one of {', '.join(_FIRST_SCALE)}, got {loss!r}")
        self.loss, self.gather = loss, False
        self.optimizer_config = optimizer or {"target": "adamw", "args": {"lr": 1e-3}}
        self.scheduler_config = scheduler
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE[loss])))
        self.logit_bias = nn.Parameter(torch.tensor(_FIRST_BIAS)) if loss == "sigmoid" else None

    @abstractmethod
    def image_vectors(self, images: Tensor) -> Tensor:
        """Return vectors [B, D].

        Args:
            images: float32 [B, C, H, W].
        """

    @abstractmethod
    def text_vectors(self, tokens: Tensor) -> Tensor:
        """Return vectors [B, D].

        Args:
            tokens: int64 [B, T], padded on the right with -1.
        """

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the unit vectors ``[B, D]`` of images ``[B, C, H, W]``."""
        return F.normalize(self.image_vectors(images), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the unit vectors ``[B, D]`` of texts ``[B, T]``, padded on the right with -1."""
        return F.normalize(self.text_vectors(tokens), dim=-1)

    def forward(self, inputs: Pairs, features: Sequence[str] = ()) -> Output:
        """Compute logits, embedding and requested activations of a batch of pairs.

        Args:
            inputs: images and texts.
            features: submodules of `backbone`, by dotted name or glob, whose activations are returned.

        Returns:
            Logits ``[B, B]`` between all images and texts of the batch, and the embedding ``[B, 2 D]``, the unit vector
            of the image followed by that of the text.
        """
        if not features:
            images, texts = self._encode(inputs)
            return Output(self._logits(images, texts), torch.cat([images, texts], dim=1), {})
        with capture(self.backbone, features) as seen:
            images, texts = self._encode(inputs)
        return Output(self._logits(images, texts), torch.cat([images, texts], dim=1), seen)

    @traceable
    def training_step(self, batch: tuple[Pairs, None], batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss`` of a batch of pairs."""
        images, texts = self._encode(batch[0])
        if self.gather:
            clamp_scale(self.logit_scale)
            return {"loss": gathered_info_nce(images, texts, self.logit_scale.exp())}
        logits = self._logits(images, texts)
        return {"loss": info_nce(logits) if self.loss == "contrastive" else sigmoid_loss(logits)}

    def validation_step(
        self, batch: tuple[Pairs, None], batch_idx: int = 0, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return ``loss`` of a batch, and ``recall_at_1``, the fraction of images whose own text ranks first."""
        logits = self(batch[0]).logits
        own = torch.arange(len(logits), device=logits.device)
        return {"loss": info_nce(logits), "recall_at_1": (logits.argmax(1) == own).float().mean()}

    def test_step(self, batch: tuple[Pairs, None], batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the metrics of `validation_step`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: tuple[Pairs, None], batch_idx: int = 0, dataloader_idx: int = 0) -> Output:
        """Predict a batch of pairs."""
        return self(batch[0])

    def on_fit_start(self) -> None:
        """Contrast the pairs of all devices, under a Trainer on several devices."""
        self.gather = self.trainer.world_size > 1 and self.loss == "contrastive"

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: tuple[Pairs, None], batch_idx: int) -> None:
        """Log the training loss, under a Trainer."""
        self.log("train/loss", outputs["loss"], batch_size=len(batch[0][0]))

    def on_validation_batch_end(
        self, outputs: dict[str, Tensor], batch: tuple[Pairs, None], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the validation metrics, under a Trainer; it averages them over the epoch."""
        named = {f"validation/{name}": value for name, value in outputs.items()}
        self.log_dict(named, batch_size=len(batch[0][0]))

    def _encode(self, inputs: Pairs) -> Pairs:
        images, tokens = inputs
        return self.encode_image(images), self.encode_text(tokens)

    def _logits(self, images: Tensor, texts: Tensor) -> Tensor:
        if self.training:
            clamp_scale(self.logit_scale)  # clamped here, so that it applies to every objective
        logits = logits_between(images, texts, self.logit_scale.exp())
        return logits if self.logit_bias is None else logits + self.logit_bias


def logit_scale_of(module: nn.Module) -> float:
    """Return the factor by which a dual encoder multiplies cosines, at most `MAX_SCALE`.

    Args:
        module: dual encoder with a parameter `logit_scale`.
    """
    return min(math.exp(float(module.logit_scale.detach())), MAX_SCALE)


def token_counts(tokens: Tensor) -> Tensor:
    """Return the number of tokens of each text, int64 [B].

    Args:
        tokens: int64 [B, T], padded on the right with -1.
    """
    return (tokens >= 0).sum(1)
