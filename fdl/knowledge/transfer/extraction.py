"""Extraction of logits, embedding, and activations of named layers in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn

from fdl.datamodules.samples import Samples
from fdl.errors import UserError
from fdl.modules.base import SupportsFederation
from fdl.modules.features import matching_submodules
from fdl.participants import Participant

EMBEDDING = "embedding"
"""Name of the layer that every model has: the input of its last layer."""

_TRUNK = 0.9
"""A submodule with more than this share of the parameters is the trunk, not one block of it."""


@dataclass(frozen=True, eq=False)
class Extracted:
    """Outputs of a model for n samples.

    Attributes:
        logits: float32 [n, C].
        embedding: float32 [n, D].
        layers: by name, float32 [n, d], pooled but not standardised.
    """

    logits: Tensor
    embedding: Tensor
    layers: Mapping[str, Tensor]


class Moments(NamedTuple):
    """Mean and standard deviation of every feature over the proxy set, each float32 [d]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Measure the moments; a feature that hardly varies gets an infinite deviation, so that it becomes 0.

        Args:
            values: features of the proxy set, [n, d].
        """
        wide = values.double()
        mean, std = wide.mean(0), wide.std(0, correction=0)
        dead = std <= 1e-6 * wide.abs().amax(0).clamp_min(1e-12)
        return cls(mean.float(), std.masked_fill(dead, torch.inf).float())

    def standardize(self, values: Tensor) -> Tensor:
        """Standardise values to mean 0 and deviation 1 over the proxy set.

        Args:
            values: features, [n, d].
        """
        return (values - self.mean) / self.std


def pool(activation: Tensor) -> Tensor:
    """Pool activations to one vector per sample: the mean over positions of feature maps [B, C, …] or tokens [B, T, d].

    Args:
        activation: [B, d], [B, T, d], or [B, C, H, W] and the like.

    Raises:
        UserError: it has no features, [B].
    """
    if activation.ndim < 2:
        raise UserError(f"features: an activation of shape {list(activation.shape)} has no vector for each sample")
    if activation.ndim == 3:
        return activation.mean(1)
    return activation.flatten(2).mean(2) if activation.ndim > 3 else activation


def block_names(network: nn.Module, head: str | None = None) -> list[str]:
    """The stages of a network, in order: the first level at which its parameters are spread over several submodules.

    From the whole network downwards, a submodule with more than nine tenths of the parameters is replaced by its own
    submodules. The classification head is not a block, nor are submodules without parameters.

    Args:
        network: a network, e.g. a classifier's backbone.
        head: dotted name of its classification layer; None for ``"head"``.

    Returns:
        Dotted names; at least one for a network with a parameter outside of its head.
    """
    head = head or "head"
    prefix, here = "", network
    while True:
        sizes = {
            f"{prefix}{name}": sum(parameter.numel() for parameter in child.parameters())
            for name, child in here.named_children()
            if f"{prefix}{name}" != head
        }
        sizes = {name: size for name, size in sizes.items() if size}
        trunk = next((name for name, size in sizes.items() if size > _TRUNK * sum(sizes.values())), None)
        if trunk is None or not any(True for _ in network.get_submodule(trunk).children()):
            return list(sizes)
        prefix, here = f"{trunk}.", network.get_submodule(trunk)


def layer_names(module: SupportsFederation, layers: int | Sequence[str]) -> list[str]:
    """Choose layers of a classifier.

    Args:
        module: its `feature_network` has the layers, its `feature_head` is no block.
        layers: the last so many `block_names`; or dotted names and globs, among which ``"embedding"`` is what the last
            layer sees.

    Returns:
        Dotted names, and ``"embedding"`` where it was asked for; just that for a count of 0 and for a module without
        a backbone.

    Raises:
        UserError: a pattern matches nothing.
    """
    network = module.feature_network()
    if isinstance(layers, int):
        found = block_names(network, module.feature_head())[-layers:] if layers and network is not None else []
        return found or [EMBEDDING]
    patterns = [pattern for pattern in layers if pattern != EMBEDDING]
    if patterns and network is None:
        raise UserError(
            f"features: {type(module).__name__} has no backbone whose layers could be named; let its feature_network() "
            "return the network that has them"
        )
    return [
        *(matching_submodules(network, patterns) if patterns else ()),
        *([EMBEDDING] if EMBEDDING in layers else ()),
    ]


def extract(
    participant: Participant, module: LightningModule, samples: Samples, names: Sequence[str] | None
) -> Extracted:
    """Predict samples once, and return logits, embedding and the named layers.

    Args:
        participant: the participant that computes.
        module: its forward takes `features` and gives an `Output`.
        samples: n samples.
        names: as `layer_names` gives them; None keeps the logits alone.
    """
    if names is None:
        logits = participant.predict(module, samples)
        return Extracted(logits, logits[:, :0], {})
    view = _Flat(module, names)
    flat = participant.predict(view, samples, "flat")
    parts = dict(zip(view.order, flat.split(view.widths, dim=1)))
    layers = {name: parts[EMBEDDING] if name == EMBEDDING else parts[f"layer {name}"] for name in names}
    return Extracted(parts["logits"].contiguous(), parts[EMBEDDING], layers)


class _FlatOutput(NamedTuple):
    flat: Tensor


class _Flat(nn.Module):
    """Concatenation of a model's outputs, so that one pass and one buffer suffice."""

    def __init__(self, module: nn.Module, names: Sequence[str]):
        super().__init__()
        self.module, self.names = module, [name for name in names if name != EMBEDDING]
        self.order = ["logits", EMBEDDING, *(f"layer {name}" for name in self.names)]
        self.widths: list[int] = []

    def forward(self, inputs: Tensor) -> _FlatOutput:
        output = self.module(inputs, features=self.names)
        columns = [output.logits, output.embedding, *(pool(output.features[name]) for name in self.names)]
        self.widths = [column.shape[1] for column in columns]
        return _FlatOutput(torch.cat([column.float() for column in columns], dim=1))
