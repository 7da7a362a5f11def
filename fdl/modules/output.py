"""Output of a forward pass, the same for every family of models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """Output of a model for one batch.

    A named tuple, not a dataclass: Fabric converts the precision of the result of a forward pass, which works inside
    tuples and mappings but raises for frozen dataclasses.

    Attributes:
        logits: unnormalised scores, ``[B, C]``.
        embedding: input of the last layer, ``[B, D]``; None from a module that does not return it, in which case it is
            captured with a hook.
        features: activations of the requested submodules, by name; empty if none were requested.
    """

    logits: Tensor
    embedding: Tensor | None = None
    features: Mapping[str, Tensor] = MappingProxyType({})
