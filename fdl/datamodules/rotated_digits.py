"""Digits in several domains, without a download."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fdl.datamodules.digits import Digits
from fdl.datamodules.source import Source
from fdl.errors import UserError
from fdl.utils.seeding import numpy_stream


class RotatedDigits(Digits):
    """Handwritten digits in as many domains as there are angles: every image is turned by one of them.

    The domain of each image is its group, so that ``partition: by_group`` gives every client one angle. Proxy,
    validation and test sets hold images of all angles.

    Args:
        angles: in degrees, counterclockwise; each image gets one of them, all equally often.
        common: the arguments of `Digits`.
    """

    name = "rotated_digits"

    def __init__(self, angles: list[float] | None = None, **common: Any):
        super().__init__(**common)
        self.angles = [0.0, 30.0, 60.0, 90.0] if angles is None else [float(angle) for angle in angles]
        if not self.angles:
            raise UserError("angles must name at least one angle")

    def load(self) -> Source:
        """Read the digits and turn them."""
        source = super().load()
        indices = np.arange(len(source.train))
        domains = numpy_stream(self.seed, "angles").permutation(indices % len(self.angles))
        x, labels = source.train.batch(torch.from_numpy(indices))
        for domain, angle in enumerate(self.angles):
            own = domains == domain
            x[own] = transforms.rotate(x[own], angle, interpolation=InterpolationMode.BILINEAR)
        names = np.array([f"{angle:g}°" for angle in self.angles])
        return replace(source, train=self.in_memory(x, labels), groups=names[domains])
