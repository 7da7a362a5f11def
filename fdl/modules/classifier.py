"""Base class of image classifiers: a LightningModule around any network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.losses.responses import cross_entropy
from fdl.modules.features import capture, capture_input, last_layer
from fdl.modules.input_adapter import InputAdapter
from fdl.modules.objectives import ignores_padding, mean_over, samples_of
from fdl.modules.output import Output
from fdl.modules.tracing import traceable
from fdl.modules.trainer_hooks import TrainerHooks
from fdl.modules.tuning import apply_tuning, keep_frozen_in_eval
from fdl.modules.types import TensorBatch
from fdl.utils.suggest import suggest


class ImageClassifier(TrainerHooks):
    """Image classifier around a network, for a plain Trainer and for federated rounds.

    Federated rounds call `training_step` without a Trainer, so steps return their metrics, and only hooks that a
    Trainer calls log them.

    Args:
        backbone: network that maps images ``[B, C, H, W]`` to logits ``[B, num_classes]``, or to (logits, embedding
            ``[B, D]``).
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        head: dotted name of the backbone's classification layer, whose input is the embedding. By default, if the
            backbone returns logits alone, the last linear layer (or else convolution) with `num_classes` outputs.
        adapter: conversion of images to the format that the backbone expects; None if they have it already.
        pretrained: True if the backbone's weights come from a file or a hub, and are the same at every site.
        fresh_head: True if the classification layer is new nevertheless.
        tuning: trained part: ``"full"``: everything; ``"head"``: the classification layer; ``"lora"``: that and
            low-rank updates of frozen weights (Hu et al.); ``"frozen"``: nothing.
        lora: settings of ``"lora"``, see `apply_tuning`.
        optimizer: ``{target, args}`` for a plain Trainer (see `build_optimizer`); default Adam at 0.001. Federated
            rounds use the recipe's ``local_training`` and ``server_distil`` settings instead.
        scheduler: ``{target, args, interval}`` for a plain Trainer (see `build_scheduler`); ``interval`` is
            ``"epoch"`` (default) or ``"step"``.

    Attributes:
        embedding_dim: D, width of the embedding.
        frozen: names in the state dict that are never trained and the same at every site, so that messages and
            checkpoints leave them out. Submodules that are frozen entirely stay in evaluation mode.

    Raises:
        UserError: the backbone does not accept images of this shape, returns output of another shape, or would be
            frozen with random weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        head: str | None = None,
        adapter: InputAdapter | None = None,
        pretrained: bool = False,
        fresh_head: bool = False,
        tuning: Literal["full", "head", "frozen", "lora"] = "full",
        lora: dict | None = None,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        super().__init__()
        self.backbone, self.adapter, self.head = backbone, adapter, head
        self.num_classes, self.input_shape = num_classes, tuple(input_shape)
        self.optimizer_config = optimizer or {"target": "adam", "args": {"lr": 1e-3}}
        self.scheduler_config = scheduler
        if head is not None and head not in dict(backbone.named_modules()):
            raise UserError(
                f"head: the network has no submodule {head!r}{suggest(head, dict(backbone.named_modules()))}"
            )
        self.embedding_dim = self._probe_model()
        if tuning == "frozen" and fresh_head:
            raise UserError(
                f"tuning: frozen keeps the classification layer, but the weights have none for {num_classes} classes; "
                "take tuning: head to train one"
            )
        heads = () if self.head is None else (self.head,)
        names = apply_tuning(backbone, tuning, heads, lora, pretrained=pretrained)
        self.frozen = frozenset(f"backbone.{name}" for name in names)

    def train(self, mode: bool = True) -> ImageClassifier:
        """Switch to training or evaluation mode; frozen parts stay in evaluation mode.

        Args:
            mode: True for training mode.
        """
        super().train(mode)
        if mode and self.frozen:
            keep_frozen_in_eval(self.backbone)
        return self

    def forward(self, x: Tensor, features: Sequence[str] = ()) -> Output:
        """Compute logits, embedding and requested activations of a batch.

        Args:
            x: images ``[B, C, H, W]``, normalised as the model expects.
            features: submodules of the backbone, by dotted name or glob, whose activations are returned.

        Raises:
            UserError: a name in `features` matches nothing.
        """
        if not features:
            return Output(*self._predict(x), {})
        with capture(self.backbone, features) as seen:
            logits, embedding = self._predict(x)
        return Output(logits, embedding, seen)

    @traceable
    @mean_over(samples_of)
    @ignores_padding
    def training_step(self, batch: TensorBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss``, the mean cross entropy of a labelled batch."""
        x, labels = batch
        return {"loss": cross_entropy(self(x).logits, labels)}

    def validation_step(self, batch: TensorBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss`` and ``accuracy`` of a labelled batch."""
        x, labels = batch
        logits = self(x).logits
        return {"loss": cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def test_step(self, batch: TensorBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss`` and ``accuracy`` of a labelled batch."""
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

    def _predict(self, x: Tensor) -> Any:
        if self.adapter is not None:
            x = self.adapter(x)
        if self.head is None:
            return self.backbone(x)
        with capture_input(self.backbone.get_submodule(self.head)) as seen:
            logits = self.backbone(x)
        if isinstance(logits, tuple):  # some networks return auxiliary logits in training mode
            logits = logits[0]
        embedding = seen[-1]
        return logits, embedding.mean((2, 3)) if embedding.ndim == 4 else embedding

    def _probe_model(self) -> int:
        """Run one blank image through the network, so that a mismatch fails here, and return the embedding's width."""
        output = self._predict_blank()
        if isinstance(output, Tensor):
            self._check("logits", output, self.num_classes)
            self.head = last_layer(self.backbone, self.num_classes)
            if self.head is None:
                raise UserError(
                    f"{self._label()} returns logits alone and no layer of it has {self.num_classes} outputs; "
                    "name its head, or return (logits, embedding)"
                )
            output = self._predict_blank()
        logits, embedding = output
        self._check("logits", logits, self.num_classes)
        self._check("an embedding", embedding, None)
        return embedding.shape[1]

    def _predict_blank(self) -> Any:
        image = torch.zeros(1, *self.input_shape)
        if (weight := next(self.backbone.parameters(), None)) is not None:
            image = image.to(weight)
        training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.no_grad():
                return self._predict(image)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            size = "×".join(map(str, self.input_shape))
            raise UserError(f"{self._label()} cannot take images of {size} (channels×height×width): {error}") from error
        finally:
            self.backbone.train(training)

    def _check(self, what: str, tensor: Tensor, columns: int | None) -> None:
        if tensor.ndim != 2 or columns not in (None, tensor.shape[1]):
            raise UserError(
                f"{self._label()} returns {what} of shape {list(tensor.shape)} for one image, expected "
                f"[1, {columns or 'D'}]"
            )

    def _label(self) -> str:
        network = type(self.backbone).__name__
        return f"{self.name} ({network})" if hasattr(self, "name") else network
