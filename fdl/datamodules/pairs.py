"""Images with captions, and what all data modules of such pairs share."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.images import ImageDataModule
from fdl.datamodules.samples import ImageSamples, Samples, as_indices
from fdl.datamodules.text import TextSamples, from_ids, require_same_tokenizer, token_ids, token_limit
from fdl.errors import UserError
from fdl.modules.types import Batch

log = logging.getLogger("fdl")


class PairSamples(Samples):
    """Images, each with its caption.

    A batch has no classes: pairs are learnt from as they are. Where the images have some, `labels` says them to who
    deals the pairs out and to who asks a model for them.

    Args:
        images: the images; their labels become those of the pairs.
        texts: the captions as token ids, one an image.
        groups: natural client or domain of each pair, [n]; None where there are none.

    Attributes:
        images: as given.
        texts: as given.
        labels: classes of the images, int64 [n]; None where they have none.
    """

    def __init__(self, images: ImageSamples, texts: TextSamples, groups: np.ndarray | None = None):
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images with {len(texts)} captions")
        self.images, self.texts, self.labels, self.groups = images, texts, images.labels, groups

    def __len__(self) -> int:
        return len(self.images)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return self.images.input_shape

    @property
    def mean(self) -> tuple[float, ...] | None:
        """Of each channel, as in `ImageSamples`."""
        return self.images.mean

    @property
    def std(self) -> tuple[float, ...] | None:
        """Of each channel, as in `ImageSamples`."""
        return self.images.std

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each caption, int64 [n]."""
        return self.texts.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of images and token ids as they are stored."""
        return self.images.nbytes + self.texts.nbytes

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather images float32 [B, C, H, W] and tokens int64 [B, T], the latter padded on the right with -1."""
        return (self.images.batch(indices, generator)[0], self.texts.batch(indices)[0]), None

    def subset(self, indices: Any) -> PairSamples:
        """The pairs at these positions."""
        rows = as_indices(indices, len(self))
        groups = None if self.groups is None else self.groups[rows.numpy()]
        return PairSamples(self.images.subset(rows), self.texts.subset(rows), groups)

    def unlabelled(self) -> PairSamples:
        """The same pairs without classes and groups; captions stay, being inputs."""
        return PairSamples(self.images.unlabelled(), self.texts)

    def content_hash(self) -> str:
        """blake2b of images and captions."""
        parts = f"pairs {self.images.content_hash()} {self.texts.content_hash()}"
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def transformed(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, augment: str | None = None
    ) -> PairSamples:
        """The same pairs with another normalisation and augmentation of the images."""
        changed = copy.copy(self)
        changed.images = self.images.transformed(mean, std, augment)
        return changed

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, as in `ImageSamples`."""
        return self.images.channel_statistics()


class PairDataModule(ImageDataModule):
    """Base of images with captions, for dual encoders.

    A proxy set consists of public pairs. Validation and test are drawn in proportion to the classes where the images
    have some. Images are normalised and augmented as in `ImageDataModule`.

    Args:
        context: most tokens of a caption; what comes after them is cut off.
        tokenizer: ``"bytes"``, a local file or folder, or a name on the Hugging Face hub.
        common: the arguments of `ImageDataModule`.

    Attributes:
        truncated: how many captions were longer than the context.

    Raises:
        UserError: for values out of range.
    """

    task = "image_text"

    def __init__(self, context: int = 64, tokenizer: str = "bytes", **common: Any):
        super().__init__(**common)
        if context < 1:
            raise UserError(f"context must be at least 1 token, got {context}")
        self.context, self._spec, self.truncated = context, tokenizer, 0

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, made once."""
        from fdl.modules.tokenizers import make_tokenizer

        return make_tokenizer(self._spec)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments that images supply to a module, except their classes; tokenizer and context."""
        images = {name: value for name, value in super().model_kwargs.items() if name != "num_classes"}
        return images | {"tokenizer": self.tokenizer, "context": self.context}

    def pairs(self, images: ImageSamples, captions: Sequence[str], groups: np.ndarray | None = None) -> PairSamples:
        """Put images and their captions together, the latter cut to the context."""
        ids = token_ids(self.tokenizer, captions)
        empty = next((caption for caption, one in zip(captions, ids) if not one), None)
        if empty is not None:
            raise UserError(f"{self.name}: the tokenizer makes nothing of the caption {empty!r:.60}")
        cut = sum(len(one) > self.context for one in ids)
        if cut:
            limit = token_limit(self.context, self._spec)
            log.warning("%s: cut to %s: %d of %d captions", self.name, limit, cut, len(ids))
        self.truncated += cut
        return PairSamples(images, from_ids(self.tokenizer, [one[: self.context] for one in ids]), groups)

    def _proxy_from(self, public: FederatedDataModule) -> PairSamples:
        """The pairs of another data set, in random order."""
        if not isinstance(public, PairDataModule):
            raise UserError(f"proxy: {public.name} has no images with captions, and {self.name} needs some")
        require_same_tokenizer(self, public, self.name)
        return super()._proxy_from(public)
