"""One small module of every family, for images of 1×8×8 or 3×32×32, and networks of one's own."""

import warnings

import torch
from lightning import Trainer
from torch import nn

from fdl.modules.custom import CustomNetwork
from fdl.modules.small_classifiers import CNN, MLP, ViT
from fdl.modules.timm_model import Timm
from fdl.modules.torchvision_model import Torchvision

GREY = {"num_classes": 10, "input_shape": (1, 8, 8)}
COLOUR = {"num_classes": 10, "input_shape": (3, 32, 32)}

FAMILIES = {
    "mlp": lambda **more: MLP([32, 16], **GREY, **more),
    "cnn": lambda **more: CNN([8, 8], norm="batch", embedding=16, **GREY, **more),
    "vit": lambda **more: ViT(dim=16, depth=1, heads=2, **GREY, **more),
    "timm": lambda **more: Timm("test_vit", **COLOUR, **more),
    "torchvision": lambda **more: Torchvision("shufflenet_v2_x0_5", **COLOUR, **more),
    "custom": lambda **more: CustomNetwork("tests.modules.makers.logits_alone", {"width": 12}, **GREY, **more),
}


def logits_alone(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


class Pair(nn.Module):
    """Returns logits and embedding by itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 5), nn.Linear(5, 10)

    def forward(self, x):
        h = self.body(x.flatten(1))
        return self.head(h), h


class Rows(nn.Module):
    """Returns one row of logits a pixel row."""

    def forward(self, x):
        return x[:, 0], x[:, 0]


def not_a_network() -> int:
    return 3


def images(module, rows: int = 24, seed: int = 0):
    """Images of as many classes as there are, each with its own mean, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 10
    prototypes = torch.randn(10, *module.input_shape, generator=generator)
    return prototypes[labels] + 0.1 * torch.randn(rows, *module.input_shape, generator=generator), labels


def quiet_trainer(**settings) -> Trainer:
    """A plain Trainer on the CPU that leaves no files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
