"""Half-width floating-point formats."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray
from fdl.state.float_formats import BFLOAT16, narrow, widen


class Cast(ArrayStage):
    """Send wider real numbers in the format `to`, rounded half to even; finite values never become infinite."""

    to: ClassVar[np.dtype]

    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray:
        """Round to the narrow format."""
        return EncodedArray(1, narrow(widen(array), self.to))

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """One array of the same shape."""
        if variant != 1:
            raise self.unknown(variant)
        return (ArraySpec(self.to, spec.shape),)

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Widen to the original dtype."""
        return narrow(widen(coded.main), spec.dtype)


class Float16(Cast):
    """Send real numbers as float16: 11 significant bits, up to 65504, error at most 2**-11 of the value.

    Example:
        >>> import numpy as np
        >>> from fdl.comm.stages.base import CodecContext
        >>> encoded = Float16().encode(np.float32([1.5, 2.25]), CodecContext())
        >>> encoded.main
        array([1.5 , 2.25], dtype=float16)
    """

    name = "float16"
    to = np.dtype("<f2")


class BFloat16(Cast):
    """Send real numbers as bfloat16: 8 significant bits, float32's range, error at most 2**-8 of the value."""

    name = "bfloat16"
    to = BFLOAT16
