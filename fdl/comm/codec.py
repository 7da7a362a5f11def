"""A chain of stages, and the layout of a message's arrays in bytes.

    signature   2 bytes   checksum of the chain, so that two sites with different recipes notice
    length      varint    bytes of the schema
    schema      number of arrays; for each: name, dtype and rank in one byte, extents, for each array stage the
                variant in one byte, 0 for an array that it left alone, and the sizes that only the data could tell
    streams     up to three, each present when the schema says that it holds anything: the arrays that were left
                alone, the main parts of the others, their sides

Clients send the same schema round after round, so what was worked out for one is kept.

Arrays share a stream by role, so a model of 200 tensors pays for one code table and not for 200. The schema gives
every length but that of a compressed stream. In a stream the arrays with the widest elements come first, which keeps
every array aligned without padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fdl.comm.binary import Reader, text, varint
from fdl.comm.layout import (
    ALONE,
    BEYOND_LIMIT,
    DTYPE_CODES,
    FLOAT32,
    MAIN,
    MAX_ARRAYS,
    MAX_RANK,
    SIDE,
    Layout,
    Step,
    read_layout,
)
from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray, EntropyStage, Stage
from fdl.errors import RejectedMessageError, UserError
from fdl.state.flat_arrays import FlatArrays

if TYPE_CHECKING:
    from fdl.comm.link_state import LinkState

_MAX_KNOWN, _MAX_KEY = 16, 1 << 16
_ROWS = "rows"


class StageReport(NamedTuple):
    """Effect of one stage on one message: bytes of all arrays before and after it."""

    stage: str
    bytes_in: int
    bytes_out: int


class Codec:
    """Turns named arrays into bytes through a chain of stages, and back.

    Args:
        stages: in the order in which the sender applies them; no stage means raw bytes.

    Attributes:
        last_report: what each stage did to the message encoded last.
        signature: two bytes that tell this chain from another.
        draws: whether encoding needs random numbers.
        remembers: whether a stage keeps something from message to message.

    Raises:
        UserError: the stages do not make a chain; the message counts positions from 0.
    """

    def __init__(self, stages: Sequence[Stage] = ()):
        for position, stage in enumerate(stages):
            if not isinstance(stage, ArrayStage | EntropyStage):
                raise UserError(f"stage {position} ({type(stage).__name__}) is neither an array nor an entropy stage")
            before = stages[position - 1] if position else None
            if before and before.phase > stage.phase:
                raise UserError(
                    f"stage {position} ({stage.name}) must come before stage {position - 1} ({before.name}): "
                    "formats are narrowed first, bytes are coded last"
                )
            if before and before.phase == stage.phase:
                raise UserError(
                    f"stage {position} ({stage.name}) does the same work as stage {position - 1} ({before.name}): "
                    "keep one of them"
                )
            stage.follows(stages[:position])
        self.stages = tuple(stages)
        self.last_report: tuple[StageReport, ...] = ()
        self._array_stages = [s for s in stages if isinstance(s, ArrayStage)]
        self._entropy = stages[-1] if stages and isinstance(stages[-1], EntropyStage) else None
        self.remembers = any(stage.remembers for stage in self._array_stages)
        self.draws = any(stage.draws() for stage in self._array_stages)
        signature = ",".join(s.signature for s in stages)
        self.signature = (zlib.crc32(signature.encode()) & 0xFFFF).to_bytes(2, "little")
        self._schemas: dict[tuple, bytes] = {}  # of arrays that no stage touches, after signature and length
        self._layouts: dict[bytes, Layout] = {}

    def __repr__(self) -> str:
        return " → ".join(map(str, self.stages)) or "raw"

    def encode(
        self,
        fields: Mapping[str, np.ndarray],
        rng: np.random.Generator | None = None,
        round: int = 0,
        memory: LinkState | None = None,
    ) -> bytes:
        """Return the arrays as bytes; arguments as in `chunks`."""
        return b"".join(self.chunks(fields, rng, round, memory)[0])

    def chunks(
        self,
        fields: Mapping[str, np.ndarray],
        rng: np.random.Generator | None = None,
        round: int = 0,
        memory: LinkState | None = None,
    ) -> tuple[list, int]:
        """Return the buffers whose concatenation is the encoded message, and how many bytes they are.

        Uncompressed arrays are not copied, so join the buffers before the arrays change.

        Args:
            fields: arrays of booleans, integers or real numbers (`fdl.state.float_formats.BFLOAT16` too), any shape.
            rng: source of rounding noise; needed when `draws`.
            round: the current round.
            memory: of the link that the message goes over, for a chain that `remembers`; without it every message is
                like the first.

        Raises:
            UserError: an array has a dtype or rank that cannot be sent.
        """
        if not self.stages:
            return self._raw(fields)
        arrays = [a if a.flags.c_contiguous else np.array(a, order="C") for a in fields.values()]
        streams: tuple[list[np.ndarray], ...] = ([], [], [])
        saved = [0] * len(self._array_stages)
        schema = self._code(fields, arrays, streams, saved, CodecContext(rng, round), memory)
        buffers = [self.signature, varint(len(schema)), schema]
        before = after = 0
        for members in streams:
            size = sum([array.nbytes for array in members])
            if size:
                before += size
                after += self._write(buffers, members, size)
        self._report(before + sum(saved), saved, after)
        return buffers, 2 + len(buffers[1]) + len(schema) + after

    def _raw(self, fields: Mapping[str, np.ndarray]) -> tuple[list, int]:
        """`chunks` of a chain without stages: small models send such messages by the thousand, so calls count."""
        if isinstance(fields, FlatArrays):
            head = self._schemas.get(fields.layout) or self._head(fields.layout, fields)
            return [head, fields.buffer], len(head) + fields.buffer.nbytes
        arrays, key, size, width, rising = [], [], 0, 16, False
        for name, array in fields.items():
            if not array.flags.c_contiguous:
                array = np.array(array, order="C")
            dtype = array.dtype
            arrays.append(array)
            key += (name, dtype, array.shape)
            size += array.nbytes
            rising |= dtype.itemsize > width
            width = dtype.itemsize
        known = tuple(key)
        head = self._schemas.get(known) or self._head(known, dict(zip(fields, arrays)))
        if rising:
            arrays.sort(key=_width)
        return [head, *arrays], len(head) + size

    def _head(self, known: tuple, fields: Mapping[str, np.ndarray]) -> bytes:
        """Signature and schema of arrays that no stage touches, to be kept under what is known of their form."""
        schema = self._code(fields, list(fields.values()), ([], [], []), [], CodecContext(), None)
        return _remember(self._schemas, known, self.signature + varint(len(schema)) + schema)

    def _code(
        self,
        names: Iterable[str],
        arrays: Sequence[np.ndarray],
        streams: tuple[list[np.ndarray], ...],
        saved: list[int],
        turn: CodecContext,
        memory: LinkState | None,
    ) -> bytes:
        """Send arrays through the stages into streams, add up what each stage saved; return their schema."""
        if len(arrays) > MAX_ARRAYS:
            raise UserError(f"a message holds at most {MAX_ARRAYS} arrays, got {len(arrays)}")
        schema = [varint(len(arrays))]
        rows = dict(zip(names, arrays)).get(_ROWS) if memory is not None else None
        for name, array in zip(names, arrays):
            code = DTYPE_CODES.get(array.dtype)
            if code is None or array.ndim > MAX_RANK:
                raise UserError(f"array {name!r} of dtype {array.dtype} and rank {array.ndim} cannot be sent")
            schema += (text(name), bytes((code | array.ndim << 4,)), *map(varint, array.shape))
            turn.rows = _names_rows(rows, name)
            main, role, complete = array, ALONE, False
            for index, stage in enumerate(self._array_stages):
                spec = ArraySpec(main.dtype, main.shape)
                touches = stage.touches(spec) and not (complete and stage.omits)
                coded = stage.encode(main, _turn(stage, name, turn, memory)) if touches else None
                if coded is not None:
                    gain = main.nbytes - coded.main.nbytes - sum([side.nbytes for side in coded.sides])
                    if gain + stage.margin > 0:
                        main, role, complete = coded.main, MAIN, complete or coded.complete
                        schema += (bytes((coded.variant,)), *map(varint, coded.extents))
                        streams[SIDE].extend(coded.sides)
                        saved[index] += gain
                        continue
                schema.append(b"\0")
            streams[role].append(main)
        return b"".join(schema)

    def decode(
        self, blob: bytes | memoryview, limit: int, round: int = 0, memory: LinkState | None = None
    ) -> Mapping[str, np.ndarray]:
        """Return the arrays, writable, with the names, dtypes, shapes and order of the sender.

        Every length is checked against `limit` and against what is left of the blob before memory is taken for it.

        Args:
            blob: what `encode` of an equal chain returned.
            limit: most bytes that the decoded arrays may have together.
            round: the current round.
            memory: of the link that the message came over, for a chain that `remembers`.

        Raises:
            RefusedError: anything else.
        """
        reader = Reader(blob)
        if reader.take(2) != self.signature:
            raise RejectedMessageError(f"encoded with another codec chain than {self}")
        schema = bytes(reader.take(reader.varint()))
        layout = self._layouts.get(schema)
        if layout is None:
            layout = _remember(self._layouts, schema, read_layout(Reader(schema), self._array_stages, limit))
        elif layout.total > limit:
            raise RejectedMessageError(BEYOND_LIMIT.format(limit))
        if layout.shapes is not None:
            whole = np.frombuffer(bytearray(self._read(reader, layout.total)), FLOAT32)
            reader.finish()
            return FlatArrays(whole, layout.shapes)
        parts = self._read_streams(reader, layout)
        reader.finish()
        if layout.plain:
            fields = {name: parts[index] for name, index, _ in layout.arrays}
        else:
            fields = self._restore(parts, layout, CodecContext(None, round), memory)
        for name in layout.flags:
            if fields[name].size and fields[name].view(np.uint8).max() > 1:
                raise RejectedMessageError("a boolean that is neither 0 nor 1")
        return fields

    def _read_streams(self, reader: Reader, layout: Layout) -> dict[int, np.ndarray]:
        """Return the parts by index, as arrays that share one buffer for each stream."""
        parts: dict[int, np.ndarray] = {}
        for role, (size, members) in enumerate(layout.streams):
            if not members:
                continue
            buffer = self._read(reader, size) if size else b""
            if role == ALONE:
                buffer = bytearray(buffer)  # these are the results: writable, aligned, no part of what was received
            for index, dtype, shape, offset in members:
                parts[index] = np.ndarray(shape, dtype, buffer, offset)
        return parts

    @staticmethod
    def _restore(
        parts: dict[int, np.ndarray], layout: Layout, turn: CodecContext, memory: LinkState | None
    ) -> dict[str, np.ndarray]:
        """Undo the stages, with the rows before the arrays that they name rows of."""
        fields: dict[str, np.ndarray] = {name: parts[first] for name, first, _ in layout.arrays}
        for name, first, steps in sorted(layout.arrays, key=_rows_first):
            turn.rows = _names_rows(fields.get(_ROWS), name) if memory is not None else None
            end = first + 1 + sum([step.sides for step in steps])
            for stage, spec, variant, extents, sides in reversed(steps):
                coded = EncodedArray(variant, fields[name], tuple([parts[i] for i in range(end - sides, end)]), extents)
                fields[name] = stage.decode(spec, coded, _turn(stage, name, turn, memory))
                end -= sides
        return fields

    def _write(self, buffers: list, arrays: list[np.ndarray], size: int) -> int:
        """Append one stream, the widest elements first; return its bytes.

        Before an entropy stage's stream stands its compressed length, or 0 where the bytes are left as they are.
        """
        arrays = sorted([array for array in arrays if array.nbytes], key=_width)
        if self._entropy is None:
            buffers += arrays
            return size
        raw = b"".join(arrays)
        coded = self._entropy.compress(raw)
        token, data = (varint(len(coded)), coded) if len(coded) < size else (b"\0", raw)
        buffers += (token, data)
        return len(token) + len(data)

    def _read(self, reader: Reader, size: int) -> bytes | memoryview:
        coded = reader.varint() if self._entropy else 0
        if not coded:
            return reader.take(size)
        if coded >= size:
            raise RejectedMessageError("a compressed stream that is not shorter")
        return self._entropy.expand(reader.take(coded), size)

    def _report(self, size: int, saved: list[int], final: int) -> None:
        report = []
        for stage, gain in zip(self._array_stages, saved):
            report.append(StageReport(stage.name, size, size - gain))
            size -= gain
        if self._entropy:
            report.append(StageReport(self._entropy.name, size, final))
        self.last_report = tuple(report)


def _width(array: np.ndarray) -> int:
    return -array.dtype.itemsize


def _rows_first(array: tuple[str, int, tuple[Step, ...]]) -> bool:
    return array[0] != _ROWS


def _names_rows(rows: np.ndarray | None, name: str) -> np.ndarray | None:
    """The rows, if they are numbers that can name the rows of another array."""
    return rows if rows is not None and name != _ROWS and rows.ndim == 1 and rows.dtype.kind in "iu" else None


def _turn(stage: ArrayStage, array: str, about: CodecContext, memory: LinkState | None) -> CodecContext:
    return about if memory is None or not stage.remembers else memory.turn(array, stage.name, about)


def _remember(known: dict, key: Any, value: Any) -> Any:
    """Keep what was worked out, as long as there is not much of it: a hostile sender never repeats a form."""
    if len(key) <= _MAX_KEY:
        if len(known) >= _MAX_KNOWN or len(key) + sum(map(len, known)) > 4 * _MAX_KEY:
            known.clear()
        known[key] = value
    return value
