"""What every family of models answers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """A model's answer to one batch.

    A named tuple, not a dataclass: Fabric converts the precision of whatever a forward pass returns, which it can do
    inside tuples and mappings but refuses for frozen dataclasses.

    Attributes:
        logits: unnormalised scores, ``[B, C]``.
        embedding: what the last layer saw, ``[B, D]``; None from a module that does not say, for which it is looked up.
        features: activations of the submodules that were asked for, by name; empty when none were.
    """

    logits: Tensor
    embedding: Tensor | None = None
    features: Mapping[str, Tensor] = MappingProxyType({})
