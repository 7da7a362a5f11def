"""Entropy coding at fractions of a bit, with the coder of the constriction library."""

from __future__ import annotations

import constriction
import numpy as np

from fdl.comm.binary import Reader, varint
from fdl.comm.stages.base import EntropyStage
from fdl.errors import RejectedMessageError

_PRECISION = 1 << 14  # what the frequencies of a table sum to, about
_BLOCK = 1 << 16  # symbols decoded at a time: the decoder gives four bytes for each


class AnsCoder(EntropyStage):
    """Code bytes by their frequencies at fractions of a bit: an asymmetric numeral system, kin to a range coder.

    In front stand the number of bytes and, from the least to the greatest byte that occurs, the frequencies, in groups
    of 7 bits.
    Where one byte is much more frequent than the rest, as among unchanged labels, this needs a small part of the one
    bit that a Huffman code must spend.
    """

    name = "range"

    def compress(self, data: bytes | memoryview) -> bytes:
        """Return the table of frequencies, then the coder's words."""
        symbols = np.frombuffer(data, np.uint8)
        counts = np.bincount(symbols, minlength=256)
        used = np.flatnonzero(counts)
        low, high = int(used[0]), int(used[-1])
        counts = counts[low : high + 1]
        scaled = np.ceil(counts * (_PRECISION / symbols.size)).astype(np.int64)  # nothing that occurs gets 0
        head = b"".join([varint(symbols.size), bytes((low, high)), *map(varint, scaled.tolist())])
        coder = constriction.stream.stack.AnsCoder()
        if high > low:
            coder.encode_reverse(symbols.astype(np.int32) - np.int32(low), _model(scaled))
        return head + coder.get_compressed().astype("<u4").tobytes()

    def expand(self, data: memoryview, size: int) -> bytes:
        """Return exactly `size` bytes; the coder must end in the state that it began with."""
        reader = Reader(data)
        try:
            stated, low, high = reader.varint(), reader.byte(), reader.byte()
            scaled = np.array([reader.varint() for _ in range(low, high + 1)])
        except RejectedMessageError:
            raise RejectedMessageError("range: damaged table") from None
        if stated != size:
            raise RejectedMessageError(f"range: the stream does not hold exactly {size} bytes")
        words = reader.rest()
        if len(words) % 4 or not scaled.size or scaled.max() > 2 * _PRECISION:
            raise RejectedMessageError("range: damaged stream")
        if scaled.size == 1:
            if len(words):
                raise RejectedMessageError(f"range: the stream does not hold exactly {size} bytes")
            return bytes((low,)) * size
        try:
            coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
            model = _model(scaled)
        except ValueError:
            raise RejectedMessageError("range: damaged stream") from None
        symbols = np.empty(size, np.uint8)
        for first in range(0, size, _BLOCK):
            block = symbols[first : first + _BLOCK]
            block[:] = coder.decode(model, block.size)
        symbols += np.uint8(low)
        if not coder.is_empty():
            raise RejectedMessageError(f"range: the stream does not hold exactly {size} bytes")
        return symbols.tobytes()


def _model(frequencies: np.ndarray) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(frequencies.astype(np.float32), perfect=False)
