"""Networks from a file of weights with a description of their layers, e.g. converted from a mobile model file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdl.errors import UserError
from fdl.modules.checkpoints import load_weights, read_arrays, set_input_channels, set_num_outputs
from fdl.modules.classifier import ImageClassifier
from fdl.modules.input_adapter import adapter_for

_ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}
_CONVOLUTIONS = ("conv", "dwconv")
_OTHERS = {
    "add": torch.add,
    "avgpool": lambda x: x.mean((2, 3), keepdim=True),
    "reshape": lambda x: x.flatten(1),
    "softmax": lambda x: x,  # classifiers return logits
}


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, followed by an activation.

    The output has ⌈H/stride⌉ rows; if the padding is odd, the additional row or column is below or to the right.

    Args:
        args: positional arguments of ``nn.Conv2d``.
        act: activation applied to the output.
        kwargs: keyword arguments of ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, act: nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve images ``[B, C, H, W]``."""
        pad = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pad += [total // 2, total - total // 2]
        return self.act(super().forward(F.pad(x, pad) if any(pad) else x))


class GraphNetwork(nn.Module):
    """Network of convolutions, global pooling and residual sums, connected by numbered tensors.

    Args:
        graph: ``input``, the number of the image tensor, and ``layers``, each with ``op`` (``conv``, ``dwconv``,
            ``add``, ``avgpool``, ``reshape``, ``softmax``), ``inputs``, ``output`` (numbers), and, for convolutions,
            ``name``, ``stride``, ``padding`` and ``act``. Softmax is skipped.
        shapes: shape of each weight by name, in torch's layout.

    Raises:
        UserError: an operation, padding or activation is unknown, or a weight or tensor is missing.
    """

    def __init__(self, graph: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.input = graph["input"]
        self.steps: list[tuple[str, str, tuple[int, ...], int]] = []
        known, last = {self.input}, {}
        for position, layer in enumerate(graph["layers"]):
            op, inputs, name = layer["op"], tuple(layer["inputs"]), layer.get("name", "")
            if op not in (*_CONVOLUTIONS, *_OTHERS):
                raise UserError(f"layer {position} is {op!r}, expected one of {', '.join((*_CONVOLUTIONS, *_OTHERS))}")
            if not known.issuperset(inputs):
                raise UserError(f"layer {position} ({op}) needs a tensor that no layer before it makes")
            if op in _CONVOLUTIONS:
                self.add_module(name, _convolution(layer, shapes))
            self.steps.append((op, name, inputs, layer["output"]))
            known.add(layer["output"])
            last.update(dict.fromkeys(inputs, position))
        convolutions = [name for op, name, _, _ in self.steps if op in _CONVOLUTIONS]
        if not convolutions:
            raise UserError("the graph has no convolution")
        self.head = convolutions[-1]
        # tensors are released after their last use, so that memory does not grow with depth
        self.done = [[n for n, at in last.items() if at == position] for position in range(len(self.steps))]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, 3, H, W]``."""
        tensors = {self.input: x}
        for (op, name, inputs, output), done in zip(self.steps, self.done):
            values = [tensors[number] for number in inputs]
            x = self.get_submodule(name)(*values) if op in _CONVOLUTIONS else _OTHERS[op](*values)
            for number in done:
                del tensors[number]
            tensors[output] = x
        return x.flatten(1)


class LayerGraph(ImageClassifier):
    """Pretrained network built from one ``.npz`` file that contains its weights and its graph.

    Args:
        checkpoint: path of the file. Its entry ``layers_json`` is the graph of a `GraphNetwork` as JSON, with the
            ``input_shape`` [1, H, W, C] of the training images; the weights are ``<layer>.weight`` (OIHW) and
            ``<layer>.bias``, with batch normalisation folded in.
        adapt: conversion of the images before the network (see `adapter_for`); by default they are resized to the
            file's size and scaled to −1 … 1 if their size differs.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        num_classes: number of classes. The classification layer is new if the file has a different number.
        input_shape: (C, H, W) of one image.
        common: ``tuning``, ``lora``, ``optimizer`` and ``scheduler`` of `ImageClassifier`.

    Raises:
        UserError: the file is missing, damaged, or contains no valid graph.
    """

    name = "layer_graph"

    def __init__(
        self,
        checkpoint: str,
        adapt: bool | dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        **common: Any,
    ):
        arrays = read_arrays(checkpoint)
        weights = {name: torch.from_numpy(a) for name, a in arrays.items() if a.dtype.kind == "f"}
        try:
            graph = json.loads(str(arrays["layers_json"]))
            network = GraphNetwork(graph, {name: tuple(value.shape) for name, value in weights.items()})
            _, height, width, channels = graph["input_shape"]
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            what = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f"checkpoint: {checkpoint} holds no graph of layers in layers_json: {what}") from error
        published = {"size": (height, width), "channels": channels, "interpolation": "bilinear"}
        published |= {"mean": [0.5] * channels, "std": [0.5] * channels}
        adapter = adapter_for(
            adapt, input_shape, normalization, published, wanted=tuple(input_shape[1:]) != (height, width)
        )
        load_weights(network, network.head, weights, checkpoint, "its own graph")
        set_input_channels(network, input_shape[0] if adapter is None else adapter.output_shape[0])
        fresh = set_num_outputs(network, network.head, num_classes)
        super().__init__(
            backbone=network,
            num_classes=num_classes,
            input_shape=input_shape,
            head=network.head,
            adapter=adapter,
            pretrained=True,
            fresh_head=fresh,
            **common,
        )


def _convolution(layer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> SameConv2d:
    name, act = layer["name"], layer.get("act")
    if f"{name}.weight" not in shapes:
        raise UserError(f"{name}.weight is missing")
    if layer["padding"] != "SAME":
        raise UserError(f"{name} has padding {layer['padding']!r}, expected SAME")
    if act not in _ACTIVATIONS:
        raise UserError(f"{name} has activation {act!r}, expected relu6, relu or null")
    outputs, inputs, *kernel = shapes[f"{name}.weight"]
    groups = outputs if layer["op"] == "dwconv" else 1
    return SameConv2d(inputs * groups, outputs, tuple(kernel), layer["stride"], groups=groups, act=_ACTIVATIONS[act]())
