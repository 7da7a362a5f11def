"""Sparsification: most values are not sent, and may be made good later."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from fdl.comm.stages import positions
from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray, Stage
from fdl.errors import RejectedMessageError, UserError
from fdl.state.float_formats import narrow, widen

_U8 = np.dtype(np.uint8)
_WHOLE = 1


class Sparsify(ArrayStage):
    """Send some values of an array; the receiver takes the rest as zero.

    It is for what is added up over rounds, such as updates of a model or what `delta` leaves of an answer; of weights
    or answers themselves it would make zeros. What `delta` has to send whole it leaves alone.

    With error feedback the sender keeps e, what the receiver lacks, and adds it to what it sends next: it sends
    c = C(g + e) and keeps g + e − c, all that later stages lose included, so over rounds Σc + e = Σg. The receiver
    must have accepted a message for its error to count.
    """

    phase = 12
    margin = 1
    omits = True

    def __init__(self, fraction: float, error_feedback: bool):
        if not 0 < fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {fraction}")
        self.fraction, self.error_feedback = fraction, error_feedback
        self.remembers = error_feedback

    def __str__(self) -> str:
        return f"{self.name}/{self.fraction:g}"

    def follows(self, before: Sequence[Stage]) -> None:
        """Check the chain: what `delta` leaves holds everything unsent, which error feedback would count twice."""
        if self.error_feedback and any(stage.name == "delta" for stage in before):
            raise UserError(f"{self.name} with error_feedback after delta counts what was not sent twice: leave it out")

    @abstractmethod
    def pick(self, values: np.ndarray, count: int, turn: CodecContext) -> EncodedArray:
        """Choose `count` of the flat values and code them."""

    @abstractmethod
    def place(self, count: int, coded: EncodedArray) -> tuple[np.ndarray, float]:
        """Return where among `count` the values in ``coded.main`` belong, and their scale."""

    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray:
        """Return the values that are sent, flat, and where they belong."""
        values = array.reshape(-1)
        if self.error_feedback:
            due = widen(values)
            error = turn.kept.get("error")
            if error is not None and error.shape == due.shape and error.dtype == due.dtype:
                due = due + error
            turn.draft["due"] = due
            values = narrow(due, array.dtype)
        return self.pick(values, max(1, math.ceil(self.fraction * array.size)), turn)

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Return the values at their places among zeros."""
        if coded.variant == _WHOLE:
            array = coded.main.reshape(spec.shape).copy()
        else:
            places, scale = self.place(spec.size, coded)
            array = np.zeros(spec.size, spec.dtype)
            array[places] = coded.main if scale == 1 else _scaled(coded.main, scale)
            array = array.reshape(spec.shape)
        due = turn.draft.pop("due", None)
        if due is not None:
            turn.draft["error"] = due - widen(array.reshape(-1))
        return array


class TopK(Sparsify):
    """Send the share of values that is largest in magnitude, and their places in bits or distances.

    ‖x − C(x)‖² ≤ (1 − k/d)·‖x‖² for k values of d (Stich et al. 2018).

    Args:
        fraction: of an array's values, in (0, 1].
        error_feedback: add what was not sent to the next message.
    """

    name = "top_k"
    encoder_only = ("fraction", "error_feedback")
    extents = 2
    margin = 1

    def __init__(self, fraction: float = 0.01, error_feedback: bool = False):
        super().__init__(fraction, error_feedback)

    def pick(self, values: np.ndarray, count: int, turn: CodecContext) -> EncodedArray:
        """The largest values in their order, and their places; all values where places would cost more."""
        size = np.abs(widen(values))
        places = np.sort(np.argpartition(size, size.size - count)[size.size - count :])
        coded = positions.encode(places, values.size)
        if count * values.itemsize + coded.nbytes >= values.nbytes:
            return EncodedArray(_WHOLE, values, (), (0, 0))
        return EncodedArray(2, values[places], (coded,), (count, coded.size))

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """The values, then their places."""
        if variant == _WHOLE and extents == (0, 0):
            return (ArraySpec(spec.dtype, (spec.size,)),)
        if variant != 2:
            raise self.unknown(variant)
        count, size = extents
        if not count or not positions.fits(size, count, spec.size):
            raise RejectedMessageError(f"{self.name}: {count} of {spec.size} values in {size} bytes of places")
        return ArraySpec(spec.dtype, (count,)), ArraySpec(_U8, (size,))

    def place(self, count: int, coded: EncodedArray) -> tuple[np.ndarray, float]:
        """The places as they were sent."""
        return positions.decode(coded.sides[0], coded.main.size, count), 1


class RandomK(Sparsify):
    """Send a random share of the values, and of their places only the seed that they were drawn with.

    Without a scale the values arrive as they are. Multiplied by d/k the array is unbiased, E[C(x)] = x, with
    variance (d/k − 1)·x² a value.

    Args:
        fraction: of an array's values, in (0, 1].
        error_feedback: add what was not sent to the next message.
        unbiased: multiply what is sent by d/k; not with error feedback, which sends the rest later.
    """

    name = "random_k"
    encoder_only = ("fraction", "error_feedback", "unbiased")
    extents = 1
    margin = 1

    def __init__(self, fraction: float = 0.01, error_feedback: bool = False, unbiased: bool = False):
        super().__init__(fraction, error_feedback)
        if unbiased and error_feedback:
            raise UserError("unbiased cannot go with error_feedback: what is not sent would come twice")
        self.unbiased = unbiased

    def follows(self, before: Sequence[Stage]) -> None:
        """Check the chain: unbiased scaling after `delta` would overshoot by the scale."""
        super().follows(before)
        if self.unbiased and any(stage.name == "delta" for stage in before):
            raise UserError(f"{self.name} with unbiased after delta overshoots what is to be reached: leave it out")

    def draws(self) -> bool:
        """The seed of the places."""
        return True

    def pick(self, values: np.ndarray, count: int, turn: CodecContext) -> EncodedArray:
        """Values at random places, in their order, and the seed of the places."""
        if count * values.itemsize + 8 >= values.nbytes:
            return EncodedArray(_WHOLE, values, (), (0,))
        seed = turn.rng.bit_generator.random_raw(1)
        return EncodedArray(3 if self.unbiased else 2, values[_drawn(seed, count, values.size)], (seed,), (count,))

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """The values, then the seed."""
        if variant == _WHOLE and extents == (0,):
            return (ArraySpec(spec.dtype, (spec.size,)),)
        if variant not in (2, 3):
            raise self.unknown(variant)
        if not 0 < extents[0] <= spec.size:
            raise RejectedMessageError(f"{self.name}: {extents[0]} of {spec.size} values")
        return ArraySpec(spec.dtype, (extents[0],)), ArraySpec(np.dtype("<u8"), (1,))

    def place(self, count: int, coded: EncodedArray) -> tuple[np.ndarray, float]:
        """The places that the seed gives."""
        scale = count / coded.main.size if coded.variant == 3 else 1
        return _drawn(coded.sides[0], coded.main.size, count), scale


def _drawn(seed: np.ndarray, chosen: int, count: int) -> np.ndarray:
    """Places drawn without replacement, rising: those of the least of `count` random numbers.

    The numbers are raw output of PCG64, which numpy promises never to change, so two sites draw alike.
    """
    noise = np.random.PCG64(int(seed[0])).random_raw(count)
    return np.sort(np.argpartition(noise, chosen - 1)[:chosen])


def _scaled(array: np.ndarray, scale: float) -> np.ndarray:
    x = widen(array)
    with np.errstate(all="ignore"):
        return narrow(x * x.dtype.type(scale), array.dtype)
