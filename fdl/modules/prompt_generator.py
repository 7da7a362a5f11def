"""Context vectors that a small network, trained by all sites together, makes for the classes at hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.dual_encoder import DualEncoder
from fdl.modules.prompted_dual_encoder import PromptedDualEncoder


class ClassPromptGenerator(nn.Module):
    """Learned questions look at the vectors of classes' names; what they see moves the context away from its start.

    Source: Qiu et al., "Federated Text-driven Prompt Generation for Vision-Language Models" (FedTPG, 2024). The last
    layer starts at 0, so that untrained prompts are those of the words that they start from.

    Args:
        start: ``[m, D]``.
        names: unit vectors of the classes' names, ``[C, E]``.
        width: of the network.
        heads: of its attention, a divisor of `width`.
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
        """Return ``[m, D]`` for classes int64 ``[c]``."""
        seen = self.read(self.names[classes]).unsqueeze(0)
        answers, _ = self.attention(self.questions.unsqueeze(0), seen, seen, need_weights=False)
        hidden = F.gelu(self.hidden(self.norm(answers[0])))
        return self.start + self.out(hidden)


class PromptGenerator(PromptedDualEncoder):
    """A prompted dual encoder whose context is made from the classes' names (FedTPG), and so knows new ones, too.

    Only the generator's weights are trained and sent. Base classes and new ones each get a context of their own.

    Args:
        classes: names of the classes, in the order of the labels.
        width: of the generator.
        heads: of its attention, a divisor of `width`.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: as in `PromptedDualEncoder`.
        common: the other arguments of `PromptedDualEncoder`, but for `personal`.
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
        """A generator that reads the names."""
        if personal:
            raise UserError("personal: generated prompts are shared by all sites")
        return ClassPromptGenerator(start, towers.eval().encode_text(names), **self._sizes)
