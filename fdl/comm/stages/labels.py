"""Probabilities as labels: the class alone, or a few units shared among classes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import numpy as np

from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray
from fdl.comm.stages.quantize import pack_codes, unpack_codes
from fdl.errors import RejectedMessageError, UserError
from fdl.state.float_formats import narrow, widen

_U8 = np.dtype(np.uint8)


class Label(ArrayStage):
    """A stage for matrices [n, C] whose rows are probabilities; it leaves all else alone.

    A row counts as probabilities when nothing in it is negative and its sum is 1 but for the rounding of its format.
    """

    phase = 8

    def touches(self, spec: ArraySpec) -> bool:
        """Matrices of real numbers with two classes or more."""
        return super().touches(spec) and len(spec.shape) == 2 and spec.shape[1] > 1

    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray | None:
        """Return the labels; None for rows that are not probabilities."""
        p = widen(array)
        tolerance = 1e-3 if array.dtype.itemsize > 2 else 2e-2
        with np.errstate(all="ignore"):
            proper = (p >= 0).all() and (np.abs(p.sum(axis=1, dtype=np.float64) - 1) <= tolerance).all()
        return EncodedArray(1, self.label(p)) if proper else None

    @abstractmethod
    def label(self, p: np.ndarray) -> np.ndarray:
        """Return the labels of probabilities [n, C]."""


class ArgmaxCodec(Label):
    """Send of every row of probabilities only its likeliest class; the receiver gets a one-hot row.

    CFD's 1-bit quantisation (Sattler et al. 2021): the point of {0, 1}ᶜ with sum 1 that is nearest in L1. A tie goes
    to the first of the classes.
    """

    name = "one_hot"

    def label(self, p: np.ndarray) -> np.ndarray:
        """The class, in the narrowest integers that hold it."""
        return p.argmax(axis=1).astype(_index(p.shape[1]))

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """One integer per row."""
        if variant != 1:
            raise self.unknown(variant)
        return (ArraySpec(_index(spec.shape[1]), spec.shape[:1]),)

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """One-hot rows."""
        if coded.main.max() >= spec.shape[1]:
            raise RejectedMessageError(f"{self.name}: class {coded.main.max()} of {spec.shape[1]}")
        p = np.zeros(spec.shape, np.float32)
        p[np.arange(spec.shape[0]), coded.main] = 1
        return narrow(p, spec.dtype)


class Simplex(Label):
    """Round rows of probabilities to multiples of 1/(2**bits − 1) that still sum to 1.

    CFD's b-bit quantisation (Sattler et al. 2021), argmin ‖q − p‖₁ over such rows, by largest remainders: every class
    gets the whole units that it has, and those that are left go to the largest remainders, the first of equal ones. No
    probability moves by a unit or more, and units sum to 1 exactly.

    Args:
        bits: width of a code.
    """

    name = "simplex"

    def __init__(self, bits: Literal[8, 4, 2, 1] = 2):
        if isinstance(bits, bool) or bits not in (8, 4, 2, 1):
            raise UserError(f"bits must be 8, 4, 2 or 1, got {bits!r}")
        self.bits, self._units = bits, 2**bits - 1

    @property
    def signature(self) -> str:
        """Name and width."""
        return f"{self.name}/{self.bits}"

    def label(self, p: np.ndarray) -> np.ndarray:
        """The units of every class, packed."""
        exact = p.astype(np.float64)
        exact *= self._units / exact.sum(axis=1, keepdims=True)
        units = np.floor(exact)
        left = self._units - units.sum(axis=1).astype(np.int64)
        order = np.argsort(units - exact, axis=1, kind="stable")
        extra = np.empty(p.shape, bool)
        np.put_along_axis(extra, order, np.arange(p.shape[1]) < left[:, None], axis=1)
        return pack_codes((units + extra).astype(np.uint8).reshape(-1), self.bits)

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """Packed codes."""
        if variant != 1:
            raise self.unknown(variant)
        return (ArraySpec(_U8, (-(-spec.size * self.bits // 8),)),)

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Units as probabilities."""
        units = unpack_codes(coded.main, self.bits, spec.size).reshape(spec.shape)
        if (units.sum(axis=1, dtype=np.int64) != self._units).any():
            raise RejectedMessageError(f"{self.name}: a row does not sum to 1")
        return narrow(units.astype(np.float32) / np.float32(self._units), spec.dtype)


def _index(classes: int) -> np.dtype:
    return np.min_scalar_type(classes - 1)
