"""Lossless stages over the bytes of a whole message."""

from __future__ import annotations

import zlib

import zstandard

from fdl.comm.stages.base import EntropyStage, Stage
from fdl.errors import RejectedMessageError, UserError


class Deflate(EntropyStage):
    """Huffman-code the bytes: DEFLATE without its search for repeats, which quantised numbers hardly have."""

    name = "deflate"

    def compress(self, data: bytes | memoryview) -> bytes:
        """Return a raw DEFLATE stream (no zlib frame: the message has its own checksum)."""
        # memLevel 9 gives the longest blocks, so the fewest code tables.
        coder = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        return coder.compress(data) + coder.flush()

    def expand(self, data: memoryview, size: int) -> bytes:
        """Return exactly `size` bytes; the stream is cut off as soon as it yields one more."""
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            expanded = decoder.decompress(data, size + 1)
        except zlib.error:
            raise RejectedMessageError("deflate: damaged stream") from None
        if len(expanded) != size or not decoder.eof or decoder.unused_data:
            raise RejectedMessageError(f"deflate: the stream does not hold exactly {size} bytes")
        return expanded


class Zstd(EntropyStage):
    """Compress the bytes with Zstandard: Huffman or FSE coding and a search for repeats.

    Args:
        level: effort, 1 (fast) to 22 (small).
    """

    name = "zstd"
    encoder_only = ("level",)

    def __init__(self, level: int = 3):
        if not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise UserError(f"level must be in 1 … {zstandard.MAX_COMPRESSION_LEVEL}, got {level}")
        self.level = level

    def compress(self, data: bytes | memoryview) -> bytes:
        """Return one Zstandard frame that states its content's size."""
        return zstandard.ZstdCompressor(level=self.level).compress(data)

    def expand(self, data: memoryview, size: int) -> bytes:
        """Return exactly `size` bytes; a frame that states another size or a wider window is not opened."""
        try:
            frame = zstandard.get_frame_parameters(data)
            # Our frames never need a window beyond the next power of two; the least that the format knows is 1 KiB.
            if frame.content_size != size or frame.window_size > max(2 * size, 1024):
                raise RejectedMessageError(f"zstd: the frame does not state a content of {size} bytes")
            expanded = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError:
            raise RejectedMessageError("zstd: damaged frame") from None
        if len(expanded) != size:
            raise RejectedMessageError(f"zstd: the frame does not hold exactly {size} bytes")
        return expanded


class BestOf(EntropyStage):
    """Try several entropy coders on every stream and send the shortest result; one byte says whose it is.

    Args:
        stages: the coders to try.
    """

    name = "best"

    def __init__(self, stages: list[Stage]):
        for stage in stages:
            if not isinstance(stage, EntropyStage) or isinstance(stage, BestOf):
                raise UserError(f"stages must be entropy coders such as deflate, got {stage}")
        if not 2 <= len(stages) <= 256:
            raise UserError(f"stages must be 2 coders at least, got {len(stages)}")
        self.stages = list(stages)

    @property
    def signature(self) -> str:
        """The coders in their order, which is how they are numbered."""
        return f"{self.name}({'|'.join(stage.signature for stage in self.stages)})"

    def compress(self, data: bytes | memoryview) -> bytes:
        """Return the number of the coder that did best, then its result."""
        results = [stage.compress(data) for stage in self.stages]
        number = min(range(len(results)), key=lambda i: len(results[i]))
        return bytes((number,)) + results[number]

    def expand(self, data: memoryview, size: int) -> bytes:
        """Return exactly `size` bytes."""
        if not data or data[0] >= len(self.stages):
            raise RejectedMessageError(f"best: no coder number {data[0] if data else ''}".rstrip())
        return self.stages[data[0]].expand(data[1:], size)
