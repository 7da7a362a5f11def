"""Named arrays in one contiguous buffer: the counterpart of `flat_tensors` for code without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np


class FlatArrays(Mapping[str, np.ndarray]):
    """Named float32 arrays that fill one buffer in order; views of it are created at the first access.

    Args:
        buffer: the buffer, float32 [n], contiguous.
        shapes: shape of each array by name, in order; n elements in all.
    """

    def __init__(self, buffer: np.ndarray, shapes: dict[str, tuple[int, ...]]):
        self.buffer, self.shapes = buffer, shapes

    @cached_property
    def layout(self) -> tuple:
        """Names and shapes, as a hashable value to compare."""
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
