"""Small dual encoder for images of 8 to 64 pixels per side and short captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.dual_encoder import DualEncoder, token_counts
from fdl.modules.small_classifiers import CNN, MLP

if TYPE_CHECKING:
    from fdl.modules.tokenizers import Tokenizer


class SmallDualEncoder(DualEncoder):
    """Dual encoder with a small CNN or MLP for images, and a bag of words or a small transformer for texts.

    Args:
        dim: D, width of the shared embedding space.
        image: kind of the image tower.
        widths: widths of the image tower: output channels per block of a CNN, or units per layer of an MLP; default
            [16, 32] and [128].
        text: ``"bag"`` averages the token embeddings; ``"transformer"`` also uses their order.
        width: width of a token embedding.
        depth: number of transformer blocks.
        heads: number of attention heads per block, a divisor of `width`.
        loss: ``"contrastive"`` (CLIP) or ``"sigmoid"`` (SigLIP).
        input_shape: (C, H, W) of one image.
        tokenizer: tokenizer of the captions.
        context: maximum number of tokens per caption; the rest is cut off.
        optimizer: ``{target, args}`` for a plain Trainer; default AdamW at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.
    """

    name = "tiny_dual_encoder"

    def __init__(
        self,
        dim: int = 64,
        image: Literal["cnn", "mlp"] = "cnn",
        widths: list[int] | None = None,
        text: Literal["bag", "transformer"] = "transformer",
        width: int = 64,
        depth: int = 1,
        heads: int = 2,
        loss: Literal["contrastive", "sigmoid"] = "contrastive",
        *,
        input_shape: tuple[int, int, int],
        tokenizer: Tokenizer,
        context: int,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        for key, value in (("dim", dim), ("width", width), ("depth", depth), ("heads", heads), ("context", context)):
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}")
        if image not in _IMAGE:
            raise UserError(f"image must be one of {', '.join(_IMAGE)}, got {image!r}")
        if text not in ("bag", "transformer"):
            raise UserError(f"text must be bag or transformer, got {text!r}")
        if text == "transformer" and width % heads:
            raise UserError(f"width must be a multiple of heads, got width {width} and {heads} heads")
        super().__init__(loss, optimizer, scheduler)
        self.embedding_dim, self.context = dim, context
        reader = BagOfWordsTower(tokenizer.vocab_size, width)
        if text == "transformer":
            reader = TransformerTextTower(tokenizer.vocab_size, width, depth, heads, context)
        self.backbone = nn.ModuleDict(
            {
                "image": _IMAGE[image](widths, dim, tuple(input_shape)),
                "text": nn.Sequential(reader, nn.LayerNorm(width), nn.Linear(width, dim)),
            }
        )

    def image_vectors(self, images: Tensor) -> Tensor:
        """Return vectors [B, D] of images [B, C, H, W]."""
        return self.backbone["image"](images)[0]  # the second entry is the input of its last layer

    def text_vectors(self, tokens: Tensor) -> Tensor:
        """Return vectors [B, D] of texts [B, T]."""
        return self.backbone["text"](tokens[:, : self.context])


class BagOfWordsTower(nn.Module):
    """Text tower that averages the token embeddings; 0 for a text without tokens.

    Args:
        vocabulary: number of token ids.
        width: width of a token embedding.
    """

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B, width] of [B, T]."""
        present = (tokens >= 0).unsqueeze(2)
        total = (self.embedding(tokens.clamp_min(0)) * present).sum(1)
        return total / token_counts(tokens).clamp_min(1).unsqueeze(1)


class TransformerTextTower(nn.Module):
    """Text tower of bidirectional pre-norm transformer blocks, averaged over a text's tokens.

    Args:
        vocabulary: number of token ids.
        width: width of a token embedding.
        depth: number of blocks.
        heads: number of attention heads per block, a divisor of `width`.
        context: maximum number of tokens per text.
    """

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, context: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B, width] of [B, T]."""
        present = tokens >= 0
        x = self.embedding(tokens.clamp_min(0)) + self.position[: tokens.shape[1]]
        # a text without tokens attends to everything: attention over nothing would be NaN
        hidden = ~present & present.any(1, keepdim=True)
        x = self.blocks(x, src_key_padding_mask=hidden) * present.unsqueeze(2)
        return x.sum(1) / present.sum(1).clamp_min(1).unsqueeze(1)


def _cnn(widths: list[int] | None, dim: int, input_shape: tuple[int, int, int]) -> nn.Module:
    return CNN(widths or [16, 32], embedding=2 * dim, num_classes=dim, input_shape=input_shape).backbone


def _mlp(widths: list[int] | None, dim: int, input_shape: tuple[int, int, int]) -> nn.Module:
    return MLP(widths or [128], num_classes=dim, input_shape=input_shape).backbone


_IMAGE = {"cnn": _cnn, "mlp": _mlp}
