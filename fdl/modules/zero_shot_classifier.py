"""A CLIP-like model as an image classifier: names of classes in sentences are its classification layer."""

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
    """The image tower of an open_clip model, with a classification layer made of the classes' names.

    Each class's weights are the mean of the unit vectors of sentences about it, of length 1 again and times the model's
    scale, as in Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021): the
    logits of an untrained one are the scaled cosines between image and class. The text tower is not kept. Trained
    further, it starts from there.

    Args:
        model: open_clip's name, e.g. ``ViT-B-32`` or ``RN50``; one that reads CLIP's tokens.
        classes: names of the classes, in the order of the labels.
        pretrained: tag of open_clip's weights, e.g. ``laion2b_s34b_b79k``.
        checkpoint: local file of weights instead, as in `OpenClip`.
        templates: a name among `fdl.modules.zero_shot.PROMPT_TEMPLATES`, or sentences with ``{}`` for the class's name.
        adapt: bring images to what the model knows, as in `OpenClip`.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: mean and standard deviation of each channel that the data are normalised with, for `adapt`.
        common: ``tuning``, ``lora``, ``optimizer`` and ``scheduler`` of `ImageClassifier`.

    Raises:
        UserError: there are no weights, the model cannot be had, or there are more or fewer names than classes.
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
"""Tokens of a caption that CLIP reads; sentences about classes are shorter."""


class _CosineClassifier(nn.Module):
    """Compares an image's unit vector with one vector a class."""

    def __init__(self, visual: nn.Module, weights: Tensor):
        super().__init__()
        self.visual, self.head = visual, nn.Linear(weights.shape[1], len(weights), bias=False)
        with torch.no_grad():
            self.head.weight.copy_(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.normalize(self.visual(x), dim=-1))
