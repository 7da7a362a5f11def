"""Data: a table of 569 tumours with 30 measurements each, benign or malignant.

python -m fdl fit --recipe examples/table.yaml
"""

from __future__ import annotations

import torch

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.source import Source


class Tumours(FederatedDataModule):
    """Breast Cancer Wisconsin (Diagnostic), which comes with scikit-learn; columns have mean 0 and deviation 1."""

    name = "tumours"

    def load(self) -> Source:
        """Read the table; test, validation and proxy sets are held out as the recipe says."""
        from sklearn.datasets import load_breast_cancer

        table = load_breast_cancer()
        rows = torch.from_numpy(table.data)
        rows = (rows - rows.mean(0)) / rows.std(0)
        return Source(TensorSamples(rows, torch.from_numpy(table.target)), classes=list(map(str, table.target_names)))
