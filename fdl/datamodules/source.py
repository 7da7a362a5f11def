"""A data set before anything is held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fdl.datamodules.samples import Samples


@dataclass(frozen=True)
class Source:
    """Contents of a data set before anything is held out.

    Attributes:
        train: its training samples.
        classes: names of the classes, in the order of the labels.
        test: its own test split, None where it has none.
        validation: its own validation split, None where it has none.
        groups: natural client or domain of each training sample, [n]; None where there are none.
    """

    train: Samples
    classes: list[str]
    test: Samples | None = None
    validation: Samples | None = None
    groups: np.ndarray | None = None
