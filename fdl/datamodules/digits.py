"""Handwritten digits, a data set that needs no download."""

from __future__ import annotations

from typing import Any

import torch

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.images import ImageDataModule
from fdl.datamodules.source import Source


class Digits(ImageDataModule):
    """Handwritten digits that come with scikit-learn: 1,797 greyscale images of 8 × 8 in 10 classes.

    UCI "Optical recognition of handwritten digits" (Alpaydin and Kaynak 1998). Pixels are 0 … 1.

    Args:
        proxy: source or size of the public proxy set, see `FederatedDataModule`.
        validation: number or fraction of samples held out for model selection.
        test: number or fraction of samples held out for the report, as the data have no test split.
        common: the other arguments of `ImageDataModule`.
    """

    name = "digits"

    def __init__(
        self,
        proxy: int | float | FederatedDataModule | None = 400,
        validation: int | float | None = 100,
        test: int | float | None = 360,
        **common: Any,
    ):
        super().__init__(proxy=proxy, validation=validation, test=test, **common)

    def load(self) -> Source:
        """Read the images that are part of scikit-learn."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        x = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
        return Source(self.in_memory(x, torch.from_numpy(bunch.target)), [str(name) for name in bunch.target_names])
