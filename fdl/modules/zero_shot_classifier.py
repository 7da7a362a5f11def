"""Image classifier from a CLIP-like model, whose classification layer is computed from class names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.classifier import ImageClassifier
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.dual_encoder import logit_scale_of
from fdl.modules.open_clip_model import OpenClip
from fdl.modules.zero_shot import zero_shot_classifier


class ZeroShotClassifier(ImageClassifier):
    """Image tower of an open_clip model, with a zero-shot classification layer computed from the class names.

    The weights of a class are the re-normalised mean of its prompts' unit vectors, times the model's logit scale, as in
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021): before training, the
    logits are the scaled cosines between image and class. The text tower is discarded; training starts from these
    weights.

    Args:
        model: open_clip's name, e.g. ``ViT-B-32`` or ``RN50``, of a model that uses CLIP's tokenizer.
        classes: names of the classes, in the order of the labels.
        pretrained: tag of open_clip's weights, e.g. ``laion2b_s34b_b79k``.
        checkpoint: local file of weights instead, ``.safetensors`` or of torch.
        templates: a key of `fdl.modules.zero_shot.PROMPT_TEMPLATES`, or sentences with ``{}`` for the class name.
        adapt: convert images to the size, channels and normalisation that the model expects (see `adapter_for`); None:
            True.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        common: ``tuning``, ``lora``, ``optimizer`` and ``scheduler`` of `ImageClassifier`.

    Raises:
        UserError: no weights are given, the model cannot be loaded, or the number of names is not the number of
            classes.
    """

    name = "zero_shot_classifier"

    def __init__(
        self,
        model: str,
        classes: list[str],
        pretrained: str | None = None,
        checkpoint: str | None = None,
        templates: str | list[str] = "photo",
        adapt: bool | dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        **common: Any,
    ):
        if pretrained is None and checkpoint is None:
            raise UserError("an untrained model knows no classes by name: give pretrained or checkpoint")
        if len(classes) != num_classes:
            raise UserError(f"classes has {len(classes)} names, but the data have {num_classes} classes")
        tokenizer = ClipTokenizer(model)
        both = OpenClip(
            model,
            pretrained,
            checkpoint,
            adapt=adapt,
            input_shape=input_shape,
            tokenizer=tokenizer,
            context=_CONTEXT,
            normalization=normalization,
        )
        weights = logit_scale_of(both) * zero_shot_classifier(both, tokenizer, classes, templates)
        super().__init__(
            backbone=_CosineClassifier(both.backbone.visual, weights),
            num_classes=num_classes,
            input_shape=input_shape,
            head="head",
            adapter=both.adapter,
            pretrained=True,
            **common,
        )


_CONTEXT = 77
"""Length of CLIP's text context in tokens; prompts of class names are shorter."""


class _CosineClassifier(nn.Module):
    """Cosine classifier on an image tower, with one weight vector per class."""

    def __init__(self, visual: nn.Module, weights: Tensor):
        super().__init__()
        self.visual, self.head = visual, nn.Linear(weights.shape[1], len(weights), bias=False)
        with torch.no_grad():
            self.head.weight.copy_(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.normalize(self.visual(x), dim=-1))
