"""Prompt generation: a small network, trained by all sites, computes context vectors from class names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.dual_encoder import DualEncoder
from fdl.modules.prompted_dual_encoder import PromptedDualEncoder


class ClassPromptGenerator(nn.Module):
    """Cross-attention from learned queries to the text vectors of class names, added to the initial context.

    Source: Qiu et al., "Federated Text-driven Prompt Generation for Vision-Language Models" (FedTPG, 2024). The last
    layer is initialised with 0, so that untrained prompts equal the initial ones.

    Args:
        start: initial context vectors, ``[m, D]``.
        names: unit vectors of the class names, ``[C, E]``.
        width: width of the network.
        heads: number of attention heads, a divisor of `width`.
    """

    def __init__(self, start: Tensor, names: Tensor, width: int = 64, heads: int = 4):
        super().__init__()
        self.register_buffer("start", start.clone(), persistent=False)
        self.register_buffer("names", names.clone(), persistent=False)
        self.questions = nn.Parameter(0.02 * torch.randn(len(start), width))
        self.read = nn.Linear(names.shape[1], width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, width)
        self.out = nn.Linear(width, start.shape[1])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, classes: Tensor) -> Tensor:
        """Return context vectors ``[m, D]``.

        Args:
            classes: numbers of the classes, int64 ``[c]``.
        """
        keys = self.read(self.names[classes]).unsqueeze(0)
        attended, _ = self.attention(self.questions.unsqueeze(0), keys, keys, need_weights=False)
        hidden = F.gelu(self.hidden(self.norm(attended[0])))
        return self.start + self.out(hidden)


class PromptGenerator(PromptedDualEncoder):
    """Prompted dual encoder whose context is generated from the class names (FedTPG), for unseen classes as well.

    Only the generator's weights are trained and sent. Base classes and new classes each get their own context.

    Args:
        classes: names of the classes, in the order of the labels.
        width: width of the generator.
        heads: number of its attention heads, a divisor of `width`.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: per-channel mean and standard deviation with which the data are normalised; None: they are not.
        common: the other arguments of `PromptedDualEncoder`, except `personal`.
    """

    name = "prompt_generator"

    def __init__(
        self,
        classes: list[str],
        width: int = 64,
        heads: int = 4,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        **common: Any,
    ):
        if width < 1 or heads < 1 or width % heads:
            raise UserError(f"width must be a multiple of heads, got width {width} and {heads} heads")
        self._sizes = {"width": width, "heads": heads}
        data = {"num_classes": num_classes, "input_shape": input_shape, "normalization": normalization}
        super().__init__(classes, **data, **common)

    @torch.no_grad()
    def make_prompt(self, start: Tensor, personal: int, towers: DualEncoder, names: Tensor) -> nn.Module:
        """Return a generator of context vectors.

        Args:
            start: initial context vectors, ``[m, D]``.
            personal: number of vectors that stay at the site; must be 0.
            towers: the frozen dual encoder.
            names: tokens of the class names alone, int64 ``[C, T]``.

        Raises:
            UserError: `personal` is not 0.
        """
        if personal:
            raise UserError("personal: generated prompts are shared by all sites")
        return ClassPromptGenerator(start, towers.eval().encode_text(names), **self._sizes)
