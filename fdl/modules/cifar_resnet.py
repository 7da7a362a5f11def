"""Residual networks for CIFAR of He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fdl.errors import UserError
from fdl.modules.checkpoints import load_weights, read_weights, set_input_channels, set_num_outputs
from fdl.modules.classifier import ImageClassifier
from fdl.modules.input_adapter import adapter_for

# published weights were trained on CIFAR-10 normalised with ImageNet's statistics
_PUBLISHED = {
    "size": (32, 32),
    "channels": 3,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}


class _Block(nn.Module):
    """Two 3×3 convolutions with a shortcut without weights.

    Option A of the paper: if the block halves the image and doubles the channels, the shortcut subsamples every other
    pixel and pads with channels of zeros, half of them on each side.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(y + x)


class _Network(nn.Module):
    """Network of three stages of n blocks with 16, 32 and 64 channels, with the names of published weights."""

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(_Block(32 if i else 16, 32, 1 if i else 2) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(_Block(64 if i else 32, 64, 1 if i else 2) for i in range(blocks)))
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class CifarResNet(ImageClassifier):
    """ResNet-20, 32, 44, 56 or 110 for CIFAR: 0.27 to 1.7 million weights (He et al. 2016).

    Args:
        depth: number of layers, 6n + 2.
        checkpoint: local file of weights: ``.safetensors``, of torch, or ``.npz``.
        adapt: conversion of the images before the network (see `adapter_for`); True: to 32×32 pixels in colour,
            normalised with ImageNet's statistics, as published weights expect.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        num_classes: number of classes. The classification layer is new if the weights have a different number.
        input_shape: (C, H, W) of one image.
        common: ``tuning``, ``lora``, ``optimizer`` and ``scheduler`` of `ImageClassifier`.

    Raises:
        UserError: the depth is not 6n + 2, or the file does not match the network.
    """

    name = "cifar_resnet"

    def __init__(
        self,
        depth: int = 20,
        checkpoint: str | None = None,
        adapt: bool | dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        **common: Any,
    ):
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth must be 6n + 2 (20, 32, 44, 56, 110), got {depth}")
        adapter = adapter_for(adapt, input_shape, normalization, _PUBLISHED)
        network = _Network(depth, num_classes)
        if checkpoint is not None:
            load_weights(
                network,
                "linear",
                read_weights(checkpoint, network.state_dict()),
                checkpoint,
                f"cifar_resnet of depth {depth}",
            )
        set_input_channels(network, input_shape[0] if adapter is None else adapter.output_shape[0])
        fresh = set_num_outputs(network, "linear", num_classes)
        super().__init__(
            backbone=network,
            num_classes=num_classes,
            input_shape=input_shape,
            head="linear",
            adapter=adapter,
            pretrained=checkpoint is not None,
            fresh_head=fresh,
            **common,
        )
