"""Floating-point formats in numpy, bfloat16 included.

numpy has no bfloat16. An array of dtype `BFLOAT16` holds these numbers as tagged 16-bit patterns, so that code without
torch can distinguish them from integers, widen them and round to them.
"""

from __future__ import annotations

import numpy as np

BFLOAT16 = np.dtype([("bfloat16", "<u2")])

_WIDE = {"e": np.float32, "f": np.float32, "d": np.float64}


def is_float_dtype(dtype: np.dtype) -> bool:
    """Return True if a dtype holds real numbers: float16, bfloat16, float32 or float64.

    Args:
        dtype: any numpy dtype.

    Example:
        >>> import numpy as np
        >>> is_float_dtype(np.dtype("float16")), is_float_dtype(np.dtype("int32"))
        (True, False)
    """
    return dtype == BFLOAT16 or dtype.char in _WIDE


def widen(array: np.ndarray) -> np.ndarray:
    """Convert numbers to a format to compute in: float64 stays float64, all others become float32.

    Args:
        array: any shape, one of the dtypes of `is_float_dtype`. Every value is kept exactly.

    Example:
        >>> import numpy as np
        >>> widen(np.float16([0.5])).dtype
        dtype('float32')
    """
    if array.dtype == BFLOAT16:
        return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN warns when it is converted
        return array.astype(_WIDE[array.dtype.char], copy=False)


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round numbers to a format, half to even; finite numbers stay finite.

    A value beyond the format's range becomes its largest number of that sign, since infinity would spoil every
    sum that it enters. NaN and infinity are kept, so that a receiver still notices that the sender's training diverged.

    Args:
        values: float32 or float64, any shape. float64 is converted to bfloat16 by way of float32.
        dtype: one of the dtypes of `is_float_dtype`.

    Example:
        >>> import numpy as np
        >>> narrow(np.float32([1.0, 1e9]), np.dtype(np.float16)).tolist()  # finite numbers stay finite
        [1.0, 65504.0]
    """
    if values.dtype == dtype:
        return values
    if dtype == BFLOAT16:
        return _to_bfloat16(values)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(dtype)
    if rounded.itemsize < values.itemsize:
        overflown = np.isinf(rounded) & np.isfinite(values)
        if overflown.any():
            rounded[overflown] = np.copysign(np.finfo(dtype).max, values[overflown])
    return rounded


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = narrow(values, np.dtype(np.float32)).view(np.uint32)
    # Adding just under one half of the last kept place, or one half when that place is odd, rounds half to even:
    # a carry out of the mantissa raises the exponent, which is the encoding of the next number up.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude.size and magnitude.max() > 0x7F7F7FFF:  # the last pattern that rounds to a finite bfloat16
        infinity = np.uint32(0x7F800000)
        cut = (bits >> np.uint32(16)).astype(np.uint16)
        rounded = np.where(magnitude > infinity, cut | np.uint16(0x40), rounded)  # NaN: the carry must not wrap it
        saturated = (cut & np.uint16(0x8000)) | np.uint16(0x7F7F)
        rounded = np.where((magnitude > 0x7F7F7FFF) & (magnitude < infinity), saturated, rounded)
    return rounded.view(BFLOAT16)
