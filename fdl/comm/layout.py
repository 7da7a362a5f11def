"""Layout of an encoded message: arrays, stages and streams as declared by its schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fdl.comm.binary import Reader
from fdl.comm.stages.base import ArraySpec, ArrayStage
from fdl.errors import RejectedMessageError
from fdl.state.float_formats import BFLOAT16

_INTEGERS = ["|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"]
# The order is the wire format: new dtypes go to the end.
DTYPES = [np.dtype(d) for d in [*_INTEGERS, "<f2", "<f4", "<f8"]] + [BFLOAT16]
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
FLOAT32 = np.dtype("<f4")
MAX_RANK = 15
MAX_ARRAYS = 1 << 13  # an array without a single number takes a few bytes of a schema and hundreds in memory
ALONE, MAIN, SIDE = 0, 1, 2
BEYOND_LIMIT = "decoded size is beyond the limit of {} bytes"


class Step(NamedTuple):
    """One array stage to undo: what the array was, what the stage chose, how many of the following parts are sides."""

    stage: ArrayStage
    spec: ArraySpec
    variant: int
    extents: tuple[int, ...]
    sides: int


class Layout(NamedTuple):
    """Content of a schema.

    Attributes:
        arrays: for each array its name, the index of its main part among all parts, and the steps to undo.
        streams: for each role its size in bytes, and index, dtype, shape and place of its parts.
        total: bytes of the decoded arrays.
        plain: whether there is nothing to undo, so that the parts are the arrays.
        flags: names of the boolean arrays.
        shapes: of all arrays, by name, where they are plain float32 numbers; None for any others.
    """

    arrays: tuple[tuple[str, int, tuple[Step, ...]], ...]
    streams: tuple[tuple[int, tuple[tuple[int, np.dtype, tuple[int, ...], int], ...]], ...]
    total: int
    plain: bool
    flags: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]] | None


def read_layout(reader: Reader, stages: Sequence[ArrayStage], limit: int) -> Layout:
    """Read a schema.

    Args:
        reader: over the schema's bytes, which are not trusted.
        stages: the array stages of the chain.
        limit: most bytes that the decoded arrays may have together.

    Raises:
        RejectedMessageError: the schema is damaged, or announces more than the limit.
    """
    arrays: dict[str, tuple[str, int, tuple[Step, ...]]] = {}
    parts: list[tuple[int, ArraySpec]] = []
    flags = []
    count, total = reader.varint(), 0
    if count > MAX_ARRAYS:
        raise RejectedMessageError(f"{count} arrays announced, the most is {MAX_ARRAYS}")
    for _ in range(count):
        name, spec = _read_spec(reader, limit)
        if name in arrays:
            raise RejectedMessageError(f"two arrays of the name {name[:80]!r}")
        total += spec.nbytes
        if total > limit:
            raise RejectedMessageError(BEYOND_LIMIT.format(limit))
        if spec.dtype == np.bool_:
            flags.append(name)
        arrays[name] = name, len(parts), tuple(_read_steps(reader, stages, spec, parts))
    reader.finish()
    streams = []
    for role in (ALONE, MAIN, SIDE):
        members = [(index, spec) for index, (part_role, spec) in enumerate(parts) if part_role == role]
        members.sort(key=_member_width)
        placed, offset = [], 0
        for index, spec in members:
            placed.append((index, *spec, offset))
            offset += spec.nbytes
        streams.append((offset, tuple(placed)))
    plain = not any(steps for _, _, steps in arrays.values())
    shapes = None
    if plain and total and all(spec.dtype == FLOAT32 for _, spec in parts):
        shapes = {name: parts[index][1].shape for name, index, _ in arrays.values()}
    return Layout(tuple(arrays.values()), tuple(streams), total, plain, tuple(flags), shapes)


def _read_spec(reader: Reader, limit: int) -> tuple[str, ArraySpec]:
    name, code = reader.text(), reader.byte()
    if code & 15 >= len(DTYPES):
        raise RejectedMessageError(f"unknown dtype {code & 15}")
    spec = ArraySpec(DTYPES[code & 15], tuple(reader.varint() for _ in range(code >> 4)))
    # An empty array takes no memory, but numpy still multiplies its other extents.
    if ArraySpec(spec.dtype, tuple(extent for extent in spec.shape if extent)).nbytes > limit:
        raise RejectedMessageError(BEYOND_LIMIT.format(limit))
    return name, spec


def _read_steps(
    reader: Reader, stages: Sequence[ArrayStage], spec: ArraySpec, parts: list[tuple[int, ArraySpec]]
) -> list[Step]:
    """Read the variants of one array; append the parts that its streams hold, the main part first."""
    steps, sides = [], []
    for stage in stages:
        variant = reader.byte()
        if variant:
            if not stage.touches(spec):
                raise RejectedMessageError(f"{stage.name} does not apply to {spec.dtype} of rank {len(spec.shape)}")
            extents = tuple(reader.varint() for _ in range(stage.extents))
            main, *extra = stage.layout(spec, variant, extents)
            if main.nbytes + sum(side.nbytes for side in extra) >= spec.nbytes + stage.margin:
                raise RejectedMessageError(f"{stage.name} would enlarge an array")
            steps.append(Step(stage, spec, variant, extents, len(extra)))
            spec, sides = main, sides + [(SIDE, side) for side in extra]
    parts += [(MAIN if steps else ALONE, spec), *sides]
    return steps


def _member_width(member: tuple[int, ArraySpec]) -> int:
    return -member[1].dtype.itemsize
