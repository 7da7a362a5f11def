"""Named arrays that lie side by side in memory: what `flat_tensors` is to torch, for code that knows numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np


class FlatArrays(Mapping[str, np.ndarray]):
    """Named float32 arrays that fill one buffer in order; views of it are made when somebody asks for one.

    Args:
        buffer: the buffer, float32 [n], contiguous.
        shapes: by name, in order.
    """

    def __init__(self, buffer: np.ndarray, shapes: dict[str, tuple[int, ...]]):
        self.buffer, self.shapes = buffer, shapes

    @cached_property
    def layout(self) -> tuple:
        """What arrays of the same names and shapes have in common."""
        return tuple(self.shapes.items())

    @cached_property
    def _views(self) -> dict[str, np.ndarray]:
        views, end = {}, 0
        for name, shape in self.shapes.items():
            start, end = end, end + math.prod(shape)
            views[name] = self.buffer[start:end].reshape(shape)
        return views

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
