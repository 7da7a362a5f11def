"""A chain of stages, and the layout of a message's arrays in bytes.

    signature   2 bytes   checksum of the chain, so that two sites with different recipes notice
    count       varint    number of arrays
    schema      for each array: name, dtype and rank in one byte, extents, one byte per array stage (the variant, 0 for
                an array that the stage left alone)
    streams     up to three, each present when the schema says that it holds anything: the arrays that were left
                alone, the main parts of the others, their sides

Arrays share a stream by role, so a model of 200 tensors pays for one code table and not for 200. The schema gives
every length but that of a compressed stream. In a stream the arrays with the widest elements come first, which keeps
every array aligned without padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fdl.comm.binary import Reader, text, varint
from fdl.comm.stage import ArrayStage, EntropyStage, Spec, Stage
from fdl.errors import RefusedError, UserError
from fdl.floats import BFLOAT16

_INTEGERS = ["|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"]
# The order is the wire format: new dtypes go to the end.
_DTYPES = [np.dtype(d) for d in [*_INTEGERS, "<f2", "<f4", "<f8"]] + [BFLOAT16]
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_MAX_RANK = 15
_MAX_ARRAYS = 1 << 16
_ALONE, _MAIN, _SIDE = 0, 1, 2


class StageReport(NamedTuple):
    """What one stage did to one message: bytes of all arrays before and after it."""

    stage: str
    bytes_in: int
    bytes_out: int


class _Step(NamedTuple):
    """One array stage to undo: what the array was, and how many of the following parts are its sides."""

    stage: ArrayStage
    spec: Spec
    variant: int
    sides: int


class Codec:
    """Turns named arrays into bytes through a chain of stages, and back.

    Args:
        stages: in the order in which the sender applies them; no stage means raw bytes.

    Attributes:
        last_report: what each stage did to the message encoded last.

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
        self.stages = tuple(stages)
        self.last_report: tuple[StageReport, ...] = ()
        self._array_stages = [s for s in stages if isinstance(s, ArrayStage)]
        self._entropy = stages[-1] if stages and isinstance(stages[-1], EntropyStage) else None
        signature = ",".join(s.signature for s in stages)
        self._signature = (zlib.crc32(signature.encode()) & 0xFFFF).to_bytes(2, "little")

    def __repr__(self) -> str:
        return " → ".join(stage.signature for stage in self.stages) or "raw"

    @property
    def draws(self) -> bool:
        """Whether encoding needs random numbers."""
        return any(stage.draws() for stage in self._array_stages)

    def encode(self, fields: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> bytes:
        """Return the arrays as bytes; arguments as in `chunks`."""
        return b"".join(self.chunks(fields, rng))

    def chunks(self, fields: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> list:
        """Return the buffers whose concatenation is the encoded message.

        Uncompressed arrays are not copied, so join the buffers before the arrays change.

        Args:
            fields: arrays of booleans, integers or real numbers (`fdl.floats.BFLOAT16` included), any shape.
            rng: source of rounding noise; needed when `draws`.

        Raises:
            UserError: an array has a dtype or rank that cannot be sent.
        """
        if len(fields) > _MAX_ARRAYS:
            raise UserError(f"a message holds at most {_MAX_ARRAYS} arrays, got {len(fields)}")
        schema = [self._signature, varint(len(fields))]
        streams: tuple[list[np.ndarray], ...] = ([], [], [])
        saved = [0] * len(self._array_stages)
        for name, array in fields.items():
            if not array.flags.c_contiguous:
                array = np.array(array, order="C")
            code = _CODES.get(array.dtype)
            if code is None or array.ndim > _MAX_RANK:
                raise UserError(f"array {name!r} of dtype {array.dtype} and rank {array.ndim} cannot be sent")
            schema += (text(name), bytes((code | array.ndim << 4,)), *map(varint, array.shape))
            main, role = array, _ALONE
            for index, stage in enumerate(self._array_stages):
                spec, variant = Spec(main.dtype, main.shape), 0
                if stage.touches(spec):
                    coded = stage.encode(main, rng)
                    gain = main.nbytes - coded.main.nbytes - sum(side.nbytes for side in coded.sides)
                    if gain > 0:
                        variant, main, role = coded.variant, coded.main, _MAIN
                        streams[_SIDE].extend(coded.sides)
                        saved[index] += gain
                schema.append(bytes((variant,)))
            streams[role].append(main)
        buffers = [b"".join(schema)]
        before = after = 0
        for arrays in streams:
            size = sum(array.nbytes for array in arrays)
            if size:
                before += size
                after += self._write(buffers, sorted(arrays, key=_width), size)
        self._report(before + sum(saved), saved, after)
        return buffers

    def decode(self, blob: bytes | memoryview, limit: int) -> dict[str, np.ndarray]:
        """Return the arrays, writable, with the names, dtypes, shapes and order of the sender.

        Every length is checked against `limit` and against what is left of the blob before memory is taken for it.

        Args:
            blob: what `encode` of an equal chain returned.
            limit: most bytes that the decoded arrays may have together.

        Raises:
            RefusedError: anything else.
        """
        reader = Reader(blob)
        if reader.take(2) != self._signature:
            raise RefusedError(f"encoded with another codec chain than {self}")
        plans: dict[str, tuple[int, list[_Step]]] = {}
        parts: list[tuple[int, Spec]] = []
        count, total = reader.varint(), 0
        if count > _MAX_ARRAYS:
            raise RefusedError(f"{count} arrays announced, the most is {_MAX_ARRAYS}")
        for _ in range(count):
            name, spec = self._read_spec(reader, limit)
            if name in plans:
                raise RefusedError(f"two arrays of the name {name[:80]!r}")
            total += spec.nbytes
            if total > limit:
                raise RefusedError(f"decoded size is beyond the limit of {limit} bytes")
            plans[name] = len(parts), self._plan(reader, spec, parts)
        arrays = self._read_streams(reader, parts)
        reader.finish()
        return {name: self._restore(arrays, first, steps) for name, (first, steps) in plans.items()}

    @staticmethod
    def _read_spec(reader: Reader, limit: int) -> tuple[str, Spec]:
        name, code = reader.text(), reader.byte()
        if code & 15 >= len(_DTYPES):
            raise RefusedError(f"unknown dtype {code & 15}")
        spec = Spec(_DTYPES[code & 15], tuple(reader.varint() for _ in range(code >> 4)))
        # An empty array takes no memory, but numpy still multiplies its other extents.
        if Spec(spec.dtype, tuple(extent for extent in spec.shape if extent)).nbytes > limit:
            raise RefusedError(f"decoded size is beyond the limit of {limit} bytes")
        return name, spec

    def _plan(self, reader: Reader, spec: Spec, parts: list[tuple[int, Spec]]) -> list[_Step]:
        """Read the variants of one array; append the parts that its streams hold, the main part first."""
        steps, sides = [], []
        for stage in self._array_stages:
            variant = reader.byte()
            if variant:
                if not stage.touches(spec):
                    raise RefusedError(f"{stage.name} does not apply to {spec.dtype} of rank {len(spec.shape)}")
                main, *extra = stage.layout(spec, variant)
                if main.nbytes + sum(side.nbytes for side in extra) >= spec.nbytes:
                    raise RefusedError(f"{stage.name} would enlarge an array")
                steps.append(_Step(stage, spec, variant, len(extra)))
                spec, sides = main, sides + [(_SIDE, side) for side in extra]
        parts += [(_MAIN if steps else _ALONE, spec), *sides]
        return steps

    def _read_streams(self, reader: Reader, parts: list[tuple[int, Spec]]) -> list[np.ndarray]:
        """Return the parts as arrays that share one buffer for each stream."""
        arrays: list[np.ndarray] = [None] * len(parts)
        for role in (_ALONE, _MAIN, _SIDE):
            members = [(index, spec) for index, (part_role, spec) in enumerate(parts) if part_role == role]
            size = sum(spec.nbytes for _, spec in members)
            buffer = self._read(reader, size) if size else b""
            if role == _ALONE:
                buffer = bytearray(buffer)  # these are the results: writable, aligned, no part of what was received
            offset = 0
            for index, (dtype, shape) in sorted(members, key=_member_width):
                array = np.ndarray(shape, dtype, buffer, offset)
                if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
                    raise RefusedError("a boolean that is neither 0 nor 1")
                offset += array.nbytes
                arrays[index] = array
        return arrays

    @staticmethod
    def _restore(arrays: list[np.ndarray], first: int, steps: list[_Step]) -> np.ndarray:
        array, end = arrays[first], first + 1 + sum(step.sides for step in steps)
        for stage, spec, variant, sides in reversed(steps):
            array = stage.decode(spec, variant, array, tuple(arrays[end - sides : end]))
            end -= sides
        return array

    def _write(self, buffers: list, arrays: list[np.ndarray], size: int) -> int:
        """Append one stream; return its bytes.

        Before an entropy stage's stream stands its compressed length, or 0 where the bytes are left as they are.
        """
        arrays = [array for array in arrays if array.nbytes]
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
            raise RefusedError("a compressed stream that is not shorter")
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


def _member_width(member: tuple[int, Spec]) -> int:
    return -member[1].dtype.itemsize
