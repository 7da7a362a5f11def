"""A module: an ordinary LightningModule for rows of a table, which knows nothing of federations.

python -m fdl fit --recipe examples/table.yaml
"""

from __future__ import annotations

import math

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F


class TableNet(LightningModule):
    """Gated residual blocks over the columns of a row.

    Args:
        width: of the hidden layers.
        depth: number of blocks.
        num_classes: given by the data.
        input_shape: given by the data.
    """

    def __init__(self, width: int = 32, depth: int = 2, *, num_classes: int, input_shape: tuple[int, ...]):
        super().__init__()
        self.columns = nn.Linear(math.prod(input_shape), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width)) for _ in range(depth)
        )
        self.classes = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] of rows [B, columns]."""
        x = self.columns(x.flatten(1))
        for block in self.blocks:
            x = x + F.glu(block(x))
        return self.classes(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a labelled batch."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Used by a plain Trainer; a federation uses its recipe's."""
        return torch.optim.Adam(self.parameters(), 0.005)
