"""Weights as a message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fdl.messages.base import Message, Meta
from fdl.messages.serialization import check_finite, check_sample_count, pop_meta, reject_leftovers, to_numpy, to_torch
from fdl.state.flat_arrays import FlatArrays
from fdl.state.flat_tensors import FlatTensors, flat_view


@dataclass(frozen=True, eq=False)
class Parameters(Message):
    """Weights and buffers of a model, or an update of them.

    Attributes:
        tensors: by name; booleans, integers and real numbers of any dtype and shape. Integers and booleans (counters
            of BatchNorm) cross every chain unchanged.
        samples: number of examples that the sender trained on, 0 from the server.

    Example:
        >>> import torch
        >>> message = Parameters({"weight": torch.zeros(2, 3)}, samples=40)
        >>> message.fields()["weight"].shape, message.meta()
        ((2, 3), {'samples': 40})
    """

    kind: ClassVar[str] = "parameters"
    code: ClassVar[int] = 1

    tensors: Mapping[str, Tensor]
    samples: int = 0

    def fields(self) -> Mapping[str, np.ndarray]:
        """Return one array per tensor."""
        if isinstance(self.tensors, FlatTensors) and self.tensors.arrays is not None:
            return self.tensors.arrays
        return {name: to_numpy(name, tensor) for name, tensor in self.tensors.items()}

    def meta(self) -> Meta:
        """Return the sample count."""
        return {"samples": int(self.samples)}

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> Parameters:
        """Build the message from `fields` and `meta`."""
        meta = dict(meta)
        samples = pop_meta(meta, "samples", int)
        reject_leftovers(meta)
        if isinstance(fields, FlatArrays):
            return cls(FlatTensors.of(fields), samples)
        return cls({name: to_torch(array) for name, array in fields.items()}, samples)

    @cached_property
    def whole(self) -> Tensor | None:
        """All tensors, in order, as one vector, if they are adjacent in memory, else None; see `flat_view`."""
        return self.tensors.buffer if isinstance(self.tensors, FlatTensors) else flat_view(self.tensors.values())

    @cached_property
    def layout(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor, in order."""
        if isinstance(self.tensors, FlatTensors):
            return [(name, shape, torch.float32) for name, shape in self.tensors.shapes.items()]
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()]

    @cached_property
    def _checked(self) -> None:
        check_sample_count(self.samples)
        if self.whole is None or not math.isfinite(self.whole.sum()):
            for name, tensor in self.tensors.items():
                check_finite(f"tensor {name!r}", tensor)

    def validate(self) -> None:
        """Check that every number is finite; done once, since a message does not change."""
        return self._checked
