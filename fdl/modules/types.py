"""Types of batches."""

from __future__ import annotations

from torch import Tensor

Inputs = Tensor | tuple[Tensor, ...]
"""Images [B, C, H, W] float32, or token ids [B, T] int64 with -1 as padding on the right, or a pair of the two."""


Batch = tuple[Inputs, Tensor | None]
"""Inputs, and classes [B] int64 or None where there are none."""
