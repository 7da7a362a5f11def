"""Small image classifiers, for images of 8 to 64 pixels per side."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.classifier import ImageClassifier

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class BackboneWithHead(nn.Module):
    """Network that computes the embedding, with a linear classification layer on top.

    Args:
        trunk: network that maps images to embeddings ``[B, width]``.
        width: width of the embedding.
        num_classes: number of classes.
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, C]`` and embedding ``[B, D]``."""
        embedding = self.trunk(x)
        return self.head(embedding), embedding


class MLP(ImageClassifier):
    """Multi-layer perceptron on flattened pixels.

    Args:
        hidden: width of each hidden layer; the output of the last one is the embedding. Empty for a linear classifier.
        activation: activation function after each hidden layer.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        optimizer: ``{target, args}`` for a plain Trainer; default Adam at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.
    """

    name = "mlp"

    def __init__(
        self,
        hidden: list[int] | None = None,
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu",
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        hidden = [128, 64] if hidden is None else list(hidden)
        _positive(hidden=hidden)
        channels, height, width = input_shape
        widths = [channels * height * width, *hidden]
        trunk = nn.Sequential(nn.Flatten())
        for inputs, outputs in pairwise(widths):
            trunk.extend([nn.Linear(inputs, outputs), _activation(activation)])
        backbone = BackboneWithHead(trunk, widths[-1], num_classes)
        super().__init__(
            backbone, num_classes=num_classes, input_shape=input_shape, optimizer=optimizer, scheduler=scheduler
        )


class CNN(ImageClassifier):
    """Small convolutional network: blocks of 3×3 convolution, normalisation, ReLU and 2×2 pooling.

    Args:
        channels: output channels per block; every block halves height and width.
        norm: ``"batch"`` trains fastest at one site, but its running statistics suffer from averaging over clients;
            ``"group"`` has none.
        embedding: width of the layer before the classification layer.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        optimizer: ``{target, args}`` for a plain Trainer; default Adam at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.
    """

    name = "cnn"

    def __init__(
        self,
        channels: list[int] | None = None,
        norm: Literal["none", "batch", "group"] = "group",
        embedding: int = 64,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        channels = [32, 64] if channels is None else list(channels)
        _positive(channels=channels, embedding=[embedding])
        shrink = 2 ** len(channels)
        depth, height, width = input_shape
        if not channels:
            raise UserError("channels must name at least one block")
        if min(height, width) < shrink:
            raise UserError(
                f"{len(channels)} blocks in channels need images of at least {shrink}×{shrink}, got {height}×{width}"
            )
        if norm not in _NORMS:
            raise UserError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        trunk = nn.Sequential()
        for inputs, outputs in zip([depth, *channels], channels):
            # a normalisation would subtract a bias again
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none")
            trunk.append(nn.Sequential(conv, _NORMS[norm](outputs), nn.ReLU(), nn.MaxPool2d(2)))
        flat = channels[-1] * (height // shrink) * (width // shrink)
        trunk.extend([nn.Flatten(), nn.Linear(flat, embedding), nn.ReLU()])
        backbone = BackboneWithHead(trunk, embedding, num_classes)
        super().__init__(
            backbone, num_classes=num_classes, input_shape=input_shape, optimizer=optimizer, scheduler=scheduler
        )


class ViT(ImageClassifier):
    """Small pre-norm vision transformer: timm's, with few narrow blocks and a suitable initialisation.

    Args:
        patch: side length of a patch in pixels, a divisor of height and width; None: a quarter of the height.
        dim: width of a token, a multiple of `heads`.
        depth: number of blocks.
        heads: number of attention heads per block.
        mlp_ratio: hidden width of a block's perceptron in multiples of `dim`.
        pool: source of the embedding: the mean of all patch tokens, or a class token.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        optimizer: ``{target, args}`` for a plain Trainer; default Adam at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.
    """

    name = "vit"

    def __init__(
        self,
        patch: int | None = None,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        pool: Literal["mean", "cls"] = "mean",
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        from timm.models.vision_transformer import VisionTransformer

        channels, height, width = input_shape
        patch = max(height // 4, 1) if patch is None else patch
        _positive(patch=[patch], dim=[dim], depth=[depth], heads=[heads])
        if height % patch or width % patch:
            raise UserError(f"patch must divide the images' {height}×{width} pixels, got {patch}")
        if dim % heads:
            raise UserError(f"dim must be a multiple of heads, got dim {dim} and {heads} heads")
        backbone = VisionTransformer(
            img_size=(height, width),
            patch_size=patch,
            in_chans=channels,
            num_classes=num_classes,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            class_token=pool == "cls",
            global_pool="token" if pool == "cls" else "avg",
            weight_init="moco",
        )
        # narrow tokens need larger initial position embeddings and weights than timm's 0.02 for wide ones: on digits,
        # ten epochs of SGD at 0.1 then reach an accuracy of 0.975 instead of 0.36
        nn.init.normal_(backbone.pos_embed)
        super().__init__(
            backbone,
            num_classes=num_classes,
            input_shape=input_shape,
            head="head",
            optimizer=optimizer,
            scheduler=scheduler,
        )


_NORMS = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    # groups of 8 channels if their number is a multiple of 8, otherwise a single group
    "group": lambda channels: nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels),
}


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise UserError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


def _positive(**values: list[int]) -> None:
    for name, numbers in values.items():
        for number in numbers:
            if number < 1:
                raise UserError(f"{name} must be ≥ 1, got {number}")
