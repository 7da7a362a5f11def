"""Checks of every data set before training, independent of its format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fdl.datamodules.samples import ImageSamples, Samples, TensorSamples
from fdl.errors import UserError

if TYPE_CHECKING:
    from fdl.datamodules.source import Source

log = logging.getLogger("fdl")

MOST_UNUSED = 100
"""Numbers of classes may have gaps, since samples may be chosen; larger ones are codes of something else."""

_NAMED = 8
"""Maximum number of classes that a message names."""

Place = Callable[[str, str], str]
"""Names a part of a split for messages, as `FederatedDataModule.place` does."""


def check_samples(source: Source, place: Place) -> None:
    """Check samples for errors that rule out any task.

    Args:
        source: the data set.
        place: function that names a part of the data set for messages.

    Raises:
        UserError: there are no training samples, a test split is empty, values are not finite, or images of one split
            have another shape than those of another.
    """
    if len(source.train) == 0:
        raise UserError(f"{place('train', 'x')}: there are none; nothing can be trained on")
    if source.test is not None and len(source.test) == 0:
        raise UserError(
            f"{place('test', 'x')}: there are none; leave the split out, and set test to how many samples to hold out"
        )
    shape = None
    for split in ("train", "validation", "test"):
        images = _images(getattr(source, split))
        if images is None or len(images) == 0:
            continue
        if isinstance(images, TensorSamples) and (count := images.not_finite()):
            raise UserError(f"{place(split, 'x')}: {count} values are not finite")
        shape = shape or images.input_shape
        if images.input_shape != shape:
            raise UserError(
                f"{place(split, 'x')}: images of shape {images.input_shape}, but training has {shape}; set size and "
                "channels to bring them to one"
            )


def check_classes(source: Source, place: Place, needed: bool) -> None:
    """Check the classes of a data set, and log those without training samples.

    Args:
        source: the data set.
        place: function that names a part of the data set for messages.
        needed: whether models are trained to classify.

    Raises:
        UserError: names are equal, labels are beyond the names, or a classification has fewer than two classes.
    """
    names = [str(name) for name in source.classes]
    _check_names(names, place("train", "classes"))
    counts = {}
    for split in ("train", "validation", "test"):
        labels = getattr(getattr(source, split), "labels", None)
        if labels is None or not len(labels):
            continue
        if int(labels.min()) < 0 or int(labels.max()) >= len(names):
            raise UserError(
                f"{place(split, 'y')}: labels from {int(labels.min())} to {int(labels.max())} for {len(names)} classes"
            )
        counts[split] = np.bincount(labels.numpy(), minlength=len(names))
    if "train" not in counts or not needed:
        return
    present = counts["train"] > 0
    if present.sum() < 2:
        only = names[int(present.argmax())]
        raise UserError(
            f"{place('train', 'y')}: all {len(source.train):,} samples are of one class, {only!r}; a classifier needs "
            "at least two"
        )
    numbered = names == list(map(str, range(len(names))))
    if numbered:
        require_dense(len(names) - 1, int(present.sum()), place("train", "y"))
    absent = [names[c] for c in np.flatnonzero(~present)]
    if absent:
        tested = sum(int((counts[split] > 0)[~present].sum()) for split in counts if split == "test")
        also = f"; {tested} of these are in the test split" if tested else ""
        also += "; number them from 0 without gaps, unless samples were left out on purpose" if numbered else ""
        log.warning(
            "%s: %d of %d classes have no training samples: %s%s",
            *(place("train", "y"), len(absent), len(names), _list(absent), also),
        )


def require_dense(top: int, kinds: int, place: str) -> None:
    """Reject labels that are codes rather than class indices.

    Args:
        top: the largest label.
        kinds: number of distinct labels.
        place: name of the labels, for the message.

    Raises:
        UserError: `top` implies far more classes than there are distinct labels.
    """
    if top > 2 * kinds + MOST_UNUSED:
        raise UserError(f"{place}: {kinds} different classes, but numbers up to {top}; number them from 0")


def _check_names(names: Sequence[str], place: str) -> None:
    seen: dict[str, str] = {}
    for i, name in enumerate(names):
        key = " ".join(name.split()).casefold()
        if seen.get(key) == name:
            raise UserError(
                f"{place}: classes {names.index(name)} and {i} are both called {name!r}; each needs its own name"
            )
        if key in seen:
            log.warning(
                "%s: %r and %r are two classes, though they differ only in case or spaces", place, seen[key], name
            )
        seen[key] = name


def _images(samples: Samples | None) -> ImageSamples | None:
    """Return the images of image or image-text samples; None for others."""
    samples = getattr(samples, "images", samples)
    return samples if isinstance(samples, ImageSamples) else None


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
