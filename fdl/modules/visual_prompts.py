"""Visual prompt tuning: a frozen vision transformer of timm with trained prompt tokens and head."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.timm_model import Timm


class VisualPrompts(nn.Module):
    """Learned tokens between a vision transformer's class token and its patch tokens.

    Args:
        network: transformer; it gets this module as submodule ``prompts``, and hooks on its blocks.
        count: m, number of tokens per layer.
        deep: replace the tokens by separate ones at every block, instead of inserting them before the first block only.
    """

    def __init__(self, network: VisionTransformer, count: int, deep: bool):
        super().__init__()
        self.first, self.count = network.num_prefix_tokens, count
        # as in VPT: the bound of a linear layer from a patch's pixels to the token width
        patch = network.patch_embed.proj.weight[0].numel()
        bound = math.sqrt(6 / (patch + network.embed_dim))
        shape = (len(network.blocks) if deep else 1, count, network.embed_dim)
        self.tokens = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        network.blocks[0].register_forward_pre_hook(partial(self._insert, layer=0, instead=0))
        for layer, block in enumerate(network.blocks[1:] if deep else (), 1):
            block.register_forward_pre_hook(partial(self._insert, layer=layer, instead=count))
        network.blocks[-1].register_forward_hook(self._remove)
        network.add_module("prompts", self)

    def _insert(self, block: nn.Module, inputs: tuple[Any, ...], layer: int, instead: int) -> tuple[Any, ...]:
        """Insert a layer's tokens, replacing the `instead` tokens at their positions."""
        x, *rest = inputs
        own = self.tokens[layer].to(x).expand(len(x), -1, -1)
        return torch.cat([x[:, : self.first], own, x[:, self.first + instead :]], dim=1), *rest

    def _remove(self, block: nn.Module, inputs: tuple[Any, ...], x: Tensor) -> Tensor:
        """Remove the tokens, so that the head pools over the patch tokens only."""
        return torch.cat([x[:, : self.first], x[:, self.first + self.count :]], dim=1)


class PromptedViT(Timm):
    """Frozen vision transformer with learned prompt tokens (Jia et al., "Visual Prompt Tuning", 2022).

    Only the prompts and the classification layer are trained and sent.

    Args:
        model: timm's name of a plain vision transformer, with or without a tag of weights.
        pretrained: download timm's weights, or take them from its cache.
        checkpoint: local file of weights instead, ``.safetensors``, of torch, or ``.npz``.
        kwargs: further arguments of ``timm.create_model``.
        adapt: conversion of the images before the network, see `Timm`.
        prompts: number of tokens per layer.
        deep: give every block its own tokens (VPT-deep), instead of the first block only (VPT-shallow).
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        optimizer: ``{target, args}`` for a plain Trainer; default Adam at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Raises:
        UserError: the model cannot be loaded or does not accept the images (see `Timm`), is not a plain vision
            transformer, or has no pretrained weights.
    """

    name = "prompted_vit"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        kwargs: dict | None = None,
        adapt: bool | dict | None = None,
        prompts: int = 10,
        deep: bool = True,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        if prompts < 1:
            raise UserError(f"prompts must be at least 1, got {prompts}")
        if not pretrained and checkpoint is None:
            raise UserError("prompts are for known weights, which are not sent: give pretrained or checkpoint")
        super().__init__(
            model,
            pretrained,
            checkpoint,
            kwargs,
            adapt,
            num_classes=num_classes,
            input_shape=input_shape,
            normalization=normalization,
            tuning="head",
            optimizer=optimizer,
            scheduler=scheduler,
        )
        if not isinstance(self.backbone, VisionTransformer):
            raise UserError(f"model: prompts are for plain vision transformers of timm, and {model} is none")
        VisualPrompts(self.backbone, prompts, deep)
