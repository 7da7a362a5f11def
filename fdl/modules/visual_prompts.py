"""A vision transformer of timm of which learned tokens and the head alone are trained."""

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
    """Tokens that are put between a vision transformer's class token and its patches.

    Args:
        network: gets a submodule ``prompts``, this one, and hooks at its blocks.
        count: m, tokens at a layer.
        deep: replace them by others at every block, rather than let those of the first go through.
    """

    def __init__(self, network: VisionTransformer, count: int, deep: bool):
        super().__init__()
        self.first, self.count = network.num_prefix_tokens, count
        # as VPT: the bound of a linear layer from a patch's pixels to the tokens' width
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
        """Put a layer's tokens in the place of so many that stand there."""
        x, *rest = inputs
        own = self.tokens[layer].to(x).expand(len(x), -1, -1)
        return torch.cat([x[:, : self.first], own, x[:, self.first + instead :]], dim=1), *rest

    def _remove(self, block: nn.Module, inputs: tuple[Any, ...], x: Tensor) -> Tensor:
        """Leave the tokens out again, so that the head pools over what it knows."""
        return torch.cat([x[:, : self.first], x[:, self.first + self.count :]], dim=1)


class PromptedViT(Timm):
    """A frozen vision transformer with learned tokens (Jia et al., "Visual Prompt Tuning", 2022).

    Prompts and the classification layer are trained, and nothing else is sent.

    Args:
        model: as in `Timm`; a plain vision transformer.
        pretrained: as in `Timm`.
        checkpoint: as in `Timm`.
        kwargs: as in `Timm`.
        adapt: as in `Timm`.
        prompts: tokens at a layer.
        deep: whether every block has tokens of its own (VPT-deep), or the first alone (VPT-shallow).
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: as in `Timm`.
        optimizer: for a plain Trainer, as in `ImageClassifier`.
        scheduler: for a plain Trainer, as in `ImageClassifier`.

    Raises:
        UserError: as `Timm`; the model is no vision transformer, or has no known weights.
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
