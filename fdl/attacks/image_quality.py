"""Similarity of reconstructed and private images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fdl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fdl.datamodules.samples import Samples

_EXACT = 100.0
"""Decibels of two identical images: more than float32 can resolve."""

_WINDOW = 7
"""Side length of the uniform windows in which small images are compared, in pixels."""

_SMALL = 16
"""Images with a shorter side are small: in windows of 11×11, most of an 8×8 image would be its own reflection."""


class Scale:
    """Conversion of normalised images, as models receive them, to pixels from 0 (black) to 1 (white).

    Args:
        samples: images with a normalisation.

    Attributes:
        shape: (C, H, W) of one image.
        low: normalised value of black, [C, 1, 1].
        high: normalised value of white, [C, 1, 1].

    Raises:
        UserError: the samples are no images of at least 3×3 pixels.
    """

    def __init__(self, samples: Samples):
        stored, shape = hasattr(samples, "stored"), samples.input_shape if hasattr(samples, "stored") else ()
        if not stored or len(shape) != 3 or min(shape[1:]) < 3:
            raise UserError("inversion is for images of at least 3×3 pixels, and these data have none")
        self.shape = tuple(shape)
        mean = torch.zeros(shape[0]) if samples.mean is None else torch.tensor(samples.mean)
        std = torch.ones(shape[0]) if samples.std is None else torch.tensor(samples.std)
        std = torch.where(std > 0, std, 1.0)  # as samples treat a constant channel
        self._mean, self._std = (t.reshape(-1, 1, 1).float() for t in (mean, std))
        self.low, self.high = (-self._mean / self._std), ((1 - self._mean) / self._std)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Convert normalised images to pixels.

        Args:
            images: normalised images, [n, C, H, W].

        Returns:
            Pixels in [0, 1], float32 [n, C, H, W], on the CPU.
        """
        return (images.detach().cpu().float() * self._std + self._mean).clamp(0, 1)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image against each reference, in decibels, at most 100.

    Args:
        images: pixels in [0, 1], [n, C, H, W].
        references: pixels in [0, 1], [m, C, H, W].

    Returns:
        PSNR in dB, float32 [n, m].
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio as measure

    rows = [
        measure(image.expand_as(references), references, data_range=1.0, reduction="none", dim=(1, 2, 3))
        for image in images
    ]
    return torch.stack(rows).clamp(max=_EXACT)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Compute the structural similarity of each image with each reference (Wang et al., 2004).

    Windows are Gaussian of 11×11 pixels with σ = 1.5; images with a side of less than 16 pixels are compared in uniform
    windows of 7×7, or as large as they allow. A window is centred on every pixel, and borders are reflected.

    Args:
        images: pixels in [0, 1], [n, C, H, W].
        references: pixels in [0, 1], [m, C, H, W].

    Returns:
        SSIM, float32 [n, m].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    side = min(references.shape[2:])
    windows = {"sigma": 1.5}
    if side < _SMALL:
        windows = {"gaussian_kernel": False, "kernel_size": min(_WINDOW, side - 1 + side % 2)}
    settings = {"data_range": 1.0, "reduction": "none", "return_full_image": True, **windows}
    rows = [measure(image.expand_as(references).contiguous(), references, **settings)[1] for image in images]
    return torch.stack(rows).flatten(2).mean(2)


def match_by_psnr(images: Tensor, references: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pair images with references, each at most once, such that the sum of their PSNR is largest.

    Args:
        images: pixels in [0, 1], [n, C, H, W].
        references: pixels in [0, 1], [m, C, H, W].

    Returns:
        Rows of the images and of their references, int64 [min(n, m)] each.
    """
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(psnr(images, references).numpy(), maximize=True)


def draw_same_classes(labels: Tensor, pool: Tensor, stream: np.random.Generator) -> Tensor:
    """Draw from a pool, without replacement, as many samples of each class as the labels contain.

    If the pool has too few samples of a class, all of them are drawn.

    Args:
        labels: classes to match, int64 [n].
        pool: classes of the pool's samples, int64 [m].
        stream: random generator of the draws.

    Returns:
        Rows of the pool, int64.
    """
    order = torch.from_numpy(stream.permutation(len(pool)))
    chosen = [order[pool[order] == label][: int((labels == label).sum())] for label in labels.unique().tolist()]
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)


def gallery(rows: Mapping[str, Tensor], columns: Sequence[str], title: str) -> Figure:
    """Draw images in a grid.

    Args:
        rows: images of each row by its name, [n, C, H, W] in [0, 1].
        columns: titles of the n columns.
        title: title of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 + 1.2 * len(columns), 0.7 + 1.35 * len(rows)), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, images) in zip(grid, rows.items()):
        for axes, image in zip(line, images.numpy()):
            gray = {"cmap": "gray", "vmin": 0, "vmax": 1} if len(image) == 1 else {}
            axes.imshow(image[0] if gray else image[:3].transpose(1, 2, 0), interpolation="nearest", **gray)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    for axes, text in zip(grid[0], columns):
        axes.set_title(text, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
