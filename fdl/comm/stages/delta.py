"""Delta coding: what has changed since the last message that was accepted."""

from __future__ import annotations

import math

import numpy as np

from fdl.comm.stages import positions
from fdl.comm.stages.base import HANDFUL, ArraySpec, ArrayStage, CodecContext, EncodedArray
from fdl.errors import RejectedMessageError, UserError
from fdl.state.float_formats import is_float_dtype, narrow, widen

_WHOLE, _DIFFERENCE, _NOT_NEGATIVE, _CHANGES = 1, 2, 3, 4
_NUMBER = ArraySpec(np.dtype("<u4"), (1,))


class Delta(ArrayStage):
    """Send what differs from the last accepted message of the same sender, receiver and field.

    Real numbers go as their difference from what the *receiver* holds, so that errors of later stages do not add up:
    what quantisation lost in one round is part of the next difference. Integers, such as the labels that `one_hot`
    leaves, go only where they differ. The first message, one of another shape or dtype, and one that is nearer to
    zero than to the last go whole. Differences are rounded once more, to the array's format; where no value is
    negative, as among probabilities, none becomes so.

    A difference carries the number of the message that it refers to, and a receiver that has accepted another refuses
    it. Where a message speaks of chosen rows, it is compared with the last one value by value; `cache` is for proxy
    sets that change from round to round.

    Args:
        tolerance: a difference of a real number up to this is sent as zero, which later stages make small. The receiver
            is then off by that much and no more, in every round. Without it, quantisation spends its codes on what it
            lost itself the last time.
    """

    name = "delta"
    encoder_only = ("tolerance",)
    phase = 10
    extents = 2
    margin = 5
    remembers = True

    def __init__(self, tolerance: float = 0.0):
        if not 0 <= tolerance < math.inf:
            raise UserError(f"tolerance must be at least 0, got {tolerance}")
        self.tolerance = tolerance

    def __str__(self) -> str:
        return f"{self.name}/{self.tolerance:g}" if self.tolerance else self.name

    def touches(self, spec: ArraySpec) -> bool:
        """Every array of more than a handful but flags."""
        return len(spec.shape) > 0 and spec.size > HANDFUL and spec.dtype != np.bool_

    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray:
        """Return the array itself, its difference from the last, or the values that changed."""
        last = turn.kept.get("last")
        if last is None or last.shape != array.shape or last.dtype != array.dtype:
            return EncodedArray(_WHOLE, array, (), (0, 0), complete=True)
        number = np.array([turn.kept["number"]], _NUMBER.dtype)
        if is_float_dtype(array.dtype):
            x = widen(array)
            with np.errstate(all="ignore"):
                difference = x - widen(last)
                nearer = np.abs(difference).max() <= np.abs(x).max()  # false where one is not finite
                if self.tolerance:
                    difference[np.abs(difference) <= self.tolerance] = 0
            if nearer:
                variant = _NOT_NEGATIVE if x.min() >= 0 else _DIFFERENCE
                return EncodedArray(variant, narrow(difference, array.dtype), (number,), (0, 0))
            return EncodedArray(_WHOLE, array, (), (0, 0), complete=True)
        places = np.flatnonzero(array.reshape(-1) != last.reshape(-1))
        coded = positions.encode(places, array.size)
        if places.size * array.itemsize + coded.nbytes + number.nbytes >= array.nbytes:
            return EncodedArray(_WHOLE, array, (), (0, 0))
        return EncodedArray(_CHANGES, array.reshape(-1)[places], (coded, number), (places.size, coded.size))

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """The values; for changes, their places; the number of the message referred to."""
        if variant == _WHOLE and extents == (0, 0):
            return (spec,)
        if variant in (_DIFFERENCE, _NOT_NEGATIVE) and extents == (0, 0) and is_float_dtype(spec.dtype):
            return spec, _NUMBER
        if variant != _CHANGES or is_float_dtype(spec.dtype):
            raise self.unknown(variant)
        changed, size = extents
        if not positions.fits(size, changed, spec.size):
            raise RejectedMessageError(f"{self.name}: {changed} of {spec.size} values in {size} bytes of places")
        return ArraySpec(spec.dtype, (changed,)), ArraySpec(np.dtype(np.uint8), (size,)), _NUMBER

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Return the array, and remember it."""
        if coded.variant == _WHOLE:
            array = coded.main.copy()
        else:
            last = referred(self.name, coded.sides[-1], turn)["last"]
            if last.shape != spec.shape or last.dtype != spec.dtype:
                raise RejectedMessageError(f"{self.name}: the message referred to was {last.dtype} {list(last.shape)}")
            if coded.variant == _CHANGES:
                array = last.copy()
                array.reshape(-1)[positions.decode(coded.sides[0], coded.main.size, spec.size)] = coded.main
            else:
                with np.errstate(all="ignore"):
                    x = widen(last) + widen(coded.main)
                    array = narrow(np.maximum(x, 0) if coded.variant == _NOT_NEGATIVE else x, spec.dtype)
        turn.draft.update(last=array.copy(), number=turn.kept.get("number", 0) + 1)
        return array


def referred(stage: str, number: np.ndarray, turn: CodecContext) -> dict:
    """Return what is kept of the message that a sender refers to by its number.

    Raises:
        RefusedError: another was accepted last.
    """
    kept = turn.kept.get("number", 0)
    if kept != int(number[0]) or not kept:
        held = f"number {kept} is the last that was accepted" if kept else "none was accepted yet"
        raise RejectedMessageError(f"{stage} refers to message number {int(number[0])}, but {held}")
    return turn.kept
