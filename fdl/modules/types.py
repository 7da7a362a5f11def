"""Types of batches."""

from __future__ import annotations

from torch import Tensor

Inputs = Tensor | tuple[Tensor, ...]
"""Images [B, C, H, W] float32, or token ids [B, T] int64, padded on the right with -1, or a pair of the two."""


Batch = tuple[Inputs, Tensor | None]
"""Inputs, and labels [B] int64, or None for unlabelled data."""


TensorBatch = tuple[Tensor, Tensor | None]
"""A `Batch` whose inputs are a single tensor: images or token ids."""
