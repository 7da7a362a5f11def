"""Scale of floating-point images in memory, which must be the same in all splits."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fdl.datamodules.samples import Samples, TensorSamples
from fdl.datamodules.source import Source
from fdl.errors import UserError

log = logging.getLogger("fdl")

_SPLITS = ("train", "validation", "test")

_OVERSHOT = 0.1
"""Largest overshoot below 0 of images in 0 … 1 after resizing with a sharp filter."""

_FEWEST_BYTES = 16
"""Values that are all below this are not taken for 0 … 255."""

_ALIKE = 8
"""Splits of one scale do not differ more than so many times in how far their values spread."""


def in_unit_range(source: Source, place: Callable[[str, str], str], given: bool = False) -> Source:
    """Bring floating-point images to 0 … 1, where 8-bit ones are too.

    Those of 0 … 255 are divided by 255. Those with values below 0 are standardised already, and left as they are, as
    are small values beyond 1. The conversion is logged; all splits have to be on one scale.

    Args:
        source: the data set.
        place: names a split's inputs, for messages.
        given: whether the user set the values of black and white; then images are not rescaled.

    Returns:
        The data set, with the same samples where they were in 0 … 1.

    Raises:
        UserError: values are on no known scale, or those of the splits on different ones.
    """
    images = {split: _in_memory(getattr(source, split)) for split in _SPLITS}
    images = {split: samples for split, samples in images.items() if samples is not None and len(samples)}
    if "train" in images and len(images["train"]) > 1 and images["train"].is_constant():
        log.warning("%s: all values of all images are the same; a model can learn nothing of them", place("train", "x"))
    if given:
        return source
    floats = {split: samples.extremes() for split, samples in images.items() if samples.is_float}
    scales = {split: _scale(*found) for split, found in floats.items()}
    scales |= {split: "unit" for split in images if split not in floats}  # bytes are divided by 255 when they are used
    for split, (low, high) in floats.items():
        if scales[split] is None:
            raise UserError(
                f"{place(split, 'x')}: values from {low:g} to {high:g}, but floating-point images are 0 … 1 or "
                f"0 … 255; set value_range to what is black and what is white, such as [{low:g}, {high:g}]"
            )
    first = next(iter(scales), None)
    for split in scales:
        if not _alike(scales, floats, first, split):
            one, other = (_words(floats.get(s)) for s in (first, split))
            raise UserError(
                f"{place(first, 'x')}: {one}, but in {place(split, 'x')} there are {other}; bring both to one scale"
            )
    if not floats:
        return source
    low, high = floats.get(first, (0.0, 1.0))
    if scales[first] != "bytes":
        if low < 0 or high > 1:
            what = "%s: values from %g to %g are taken as they are; value_range would bring them to 0 … 1"
            log.info(what, place(first, "x"), low, high)
        return source
    what = "%s: values from %g to %g are divided by 255; value_range sets another scale"
    log.info(what, place(first, "x"), low, high)
    return replace(source, **{split: _divided(getattr(source, split)) for split in floats})


def _in_memory(samples: Samples | None) -> TensorSamples | None:
    """The images of samples, where they are in memory."""
    samples = getattr(samples, "images", samples)
    return samples if isinstance(samples, TensorSamples) else None


def _scale(low: float, high: float) -> str | None:
    """The name of a scale, None where values are on none that is known.

    ``"unit"``: 0 … 1, give or take what resizing overshoots. ``"bytes"``: 0 … 255. ``"standardised"``: with values
    below 0. ``"other"``: too small for bytes.
    """
    if low < -_OVERSHOT:
        return "standardised"
    if high <= 1 + 5 * _OVERSHOT:
        return "unit"
    if high < _FEWEST_BYTES:
        return "other"
    return "bytes" if high <= 255 else None


def _alike(scales: dict[str, str], floats: dict[str, tuple[float, float]], one: str, other: str) -> bool:
    """Test that two splits are on one scale; on an unknown scale, the ranges of their values have to be similar."""
    if scales[one] != scales[other]:
        return False
    if scales[one] in ("unit", "bytes"):
        return True
    widths = [high - low for low, high in (floats[one], floats[other])]
    return min(widths) * _ALIKE >= max(widths)


def _words(found: tuple[float, float] | None) -> str:
    return "bytes" if found is None else f"values from {found[0]:g} to {found[1]:g}"


def _divided(samples: Any) -> Any:
    if isinstance(samples, TensorSamples):
        return samples.divided(255.0)
    pairs = copy.copy(samples)
    pairs.images = samples.images.divided(255.0)
    return pairs
