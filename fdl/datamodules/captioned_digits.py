"""Images with captions that need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.pairs import PairDataModule
from fdl.datamodules.source import Source
from fdl.utils.seeding import numpy_stream

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Names of the classes, as captions write them."""

TEMPLATES = (
    "a handwritten {word}",
    "the digit {number}",
    "a photo of the number {word}",
    "someone wrote a {word}",
    "{number}, by hand",
    "a small grey picture of a {word}",
    "this is the digit {word}",
    "a {word} in pencil",
)
"""Caption templates; one is drawn per image."""


class CaptionedDigits(PairDataModule):
    """Handwritten digits of scikit-learn (see `Digits`), each with a sentence that names it.

    Sentences are drawn at random from `TEMPLATES`. Classes are kept for partitions and zero-shot classification, and
    are not part of a batch.

    Args:
        proxy: source or size of the public proxy set, see `FederatedDataModule`.
        validation: number or fraction of samples held out for model selection.
        test: number or fraction of samples held out for the report, as the data have no test split.
        common: the other arguments of `PairDataModule`.
    """

    name = "captioned_digits"

    def __init__(
        self,
        proxy: int | float | FederatedDataModule | None = 400,
        validation: int | float | None = 100,
        test: int | float | None = 360,
        **common: Any,
    ):
        super().__init__(proxy=proxy, validation=validation, test=test, **common)

    def load(self) -> Source:
        """Read the images that are part of scikit-learn, and write their captions."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        x = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
        images = self.in_memory(x, torch.from_numpy(bunch.target))
        chosen = numpy_stream(self.seed, "captions").integers(len(TEMPLATES), size=len(x))
        captions = [
            TEMPLATES[template].format(word=WORDS[digit], number=digit)
            for template, digit in zip(chosen.tolist(), np.asarray(bunch.target).tolist())
        ]
        return Source(self.pairs(images, captions), list(WORDS))
