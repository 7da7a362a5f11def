"""Codecs: real numbers in 8 bits on a logarithmic scale, and LZMA for what remains.

python -m fdl fit --recipe examples/codecs.yaml
"""

from __future__ import annotations

import lzma

import numpy as np

from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray, EntropyStage
from fdl.errors import RejectedMessageError, UserError
from fdl.state.float_formats import narrow, widen


class LogQuantize(ArrayStage):
    """Send a sign and one of 127 magnitudes, which fall from the array's largest by a constant factor.

    The error is relative to each value, not to the largest, which suits weights of very different sizes.

    Args:
        octaves: halvings from the largest magnitude to the smallest; what is smaller still arrives as zero.
    """

    name = "log_quantize"

    def __init__(self, octaves: float = 12.0):
        if not 0 < octaves <= 100:
            raise UserError(f"octaves must be in (0, 100], got {octaves}")
        self.octaves = octaves
        # level 127 is the largest magnitude, level 1 the smallest, level 0 is zero
        self.factors = np.concatenate([[0.0], np.exp2(-octaves * np.arange(126, -1, -1) / 126)]).astype(np.float32)

    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray:
        """Return one byte per value, and the largest magnitude as a side."""
        values = widen(array)
        largest = np.abs(values).max()
        with np.errstate(all="ignore"):
            level = 127 + 126 / self.octaves * np.log2(np.abs(values) / largest)
        level = np.clip(np.nan_to_num(np.round(level), nan=0, neginf=0), 0, 127).astype(np.uint8)
        sides = (np.array([largest], np.float32),)
        return EncodedArray(1, level | np.where(values < 0, np.uint8(128), np.uint8(0)), sides)

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """One byte per value, and one number."""
        if variant != 1:
            raise self.unknown(variant)
        return ArraySpec(np.dtype(np.uint8), spec.shape), ArraySpec(np.dtype(np.float32), (1,))

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Return the values in the array's own format."""
        values = self.factors[coded.main & 127] * coded.sides[0]
        return narrow(np.where(coded.main & 128, -values, values), spec.dtype)


class Lzma(EntropyStage):
    """Shorten bytes by LZMA, slower and mostly better than Deflate.

    Args:
        preset: effort, 0 to 6; sites need the same.
    """

    name = "lzma"

    def __init__(self, preset: int = 4):
        if not 0 <= preset <= 6:
            raise UserError(f"preset must be in 0 … 6, got {preset}")
        self.filters = [{"id": lzma.FILTER_LZMA2, "preset": preset}]

    def compress(self, data: bytes | memoryview) -> bytes:
        """Return the stream without a header, which both ends know."""
        return lzma.compress(data, lzma.FORMAT_RAW, filters=self.filters)

    def expand(self, data: memoryview, size: int) -> bytes:
        """Return exactly `size` bytes; memory never grows past them, whatever the stream says."""
        try:
            expanded = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=self.filters).decompress(data, size + 1)
        except lzma.LZMAError:
            raise RejectedMessageError("lzma: damaged stream") from None
        if len(expanded) != size:
            raise RejectedMessageError(f"lzma: the stream does not hold exactly {size} bytes")
        return expanded
