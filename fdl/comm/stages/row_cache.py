"""Cache of rows: a prediction that has hardly changed is not sent again until it expires."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fdl.comm.stages import positions
from fdl.comm.stages.base import ArraySpec, ArrayStage, CodecContext, EncodedArray, Stage
from fdl.comm.stages.delta import referred
from fdl.comm.stages.labels import Label
from fdl.errors import RejectedMessageError, UserError
from fdl.state.float_formats import widen

_WHOLE, _SOME = 1, 2
_NUMBER = ArraySpec(np.dtype("<u4"), (1,))


class Cache(ArrayStage):
    """Send the rows of an array that changed since they were last sent; the receiver repeats the others.

    A row is sent when it is new, when a value in it differs by more than the tolerance from what the receiver holds,
    or when it was last sent `expiry` rounds ago; a tolerance of 0 still saves rows that are the same. The rows are
    those that a message names, so that a proxy sample keeps its entry through rounds in which it is not asked. Entries
    that have expired are forgotten. After SCARLET (soft-label caching with expiry).

    A message carries the number of the message before it, and a receiver that has accepted another refuses it.

    Args:
        tolerance: largest difference of a value that is not worth sending.
        expiry: rounds after which a row is sent again in any case.
    """

    name = "cache"
    phase = 10
    extents = 2
    margin = 1
    remembers = True

    def __init__(self, tolerance: float = 0.0, expiry: int = 50):
        if not 0 <= tolerance < math.inf:
            raise UserError(f"tolerance must be at least 0, got {tolerance}")
        if expiry < 1:
            raise UserError(f"expiry must be at least 1 round, got {expiry}")
        self.tolerance, self.expiry = tolerance, expiry

    @property
    def signature(self) -> str:
        """Name and expiry: both ends must forget at the same time."""
        return f"{self.name}/{self.expiry}"

    def touches(self, spec: ArraySpec) -> bool:
        """Real numbers in rows."""
        return super().touches(spec) and len(spec.shape) > 1

    def __str__(self) -> str:
        return f"{self.name}/{self.tolerance:g}/{self.expiry}"

    def follows(self, before: Sequence[Stage]) -> None:
        """Labels are integers, of which there is nothing to tolerate."""
        for stage in before:
            if isinstance(stage, Label):
                raise UserError(f"{self.name} after {stage.name} has no real numbers left to hold: delta sends labels")

    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray:
        """Return the rows that are sent, and which they are."""
        rows = _rows(turn, len(array))
        held = None if rows is None else self._held(turn, array.shape[1:], array.dtype)
        if held is None:
            return EncodedArray(_WHOLE, array, (), (0, 0))
        names, values, _ = held
        at = np.searchsorted(names, rows)
        at[at == len(names)] = 0
        known = names[at] == rows if len(names) else np.zeros(len(rows), bool)
        with np.errstate(all="ignore"):
            moved = np.abs(widen(array[known]) - widen(values[at[known]])).max(axis=tuple(range(1, array.ndim)))
        send = ~known
        send[known] = ~(moved <= self.tolerance)  # what is not finite is sent
        places = np.flatnonzero(send)
        coded = positions.encode(places, len(array))
        number = np.array([turn.kept["number"]], _NUMBER.dtype)
        main = array[places]
        if main.nbytes + coded.nbytes + number.nbytes >= array.nbytes:
            return EncodedArray(_WHOLE, array, (), (0, 0))
        return EncodedArray(_SOME, main, (coded, number), (places.size, coded.size))

    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """The rows, which they are, and the number of the message before."""
        if variant == _WHOLE and extents == (0, 0):
            return (spec,)
        if variant != _SOME:
            raise self.unknown(variant)
        sent, size = extents
        if not positions.fits(size, sent, spec.shape[0]):
            raise RejectedMessageError(f"{self.name}: {sent} of {spec.shape[0]} rows in {size} bytes of places")
        return ArraySpec(spec.dtype, (sent, *spec.shape[1:])), ArraySpec(np.dtype(np.uint8), (size,)), _NUMBER

    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Return all rows, and remember those that came."""
        rows = _rows(turn, spec.shape[0])
        held = None if rows is None else self._held(turn, spec.shape[1:], spec.dtype)
        if coded.variant == _WHOLE:
            array, places = coded.main.copy(), np.arange(spec.shape[0])
        else:
            referred(self.name, coded.sides[-1], turn)
            places = positions.decode(coded.sides[0], len(coded.main), spec.shape[0])
            array = np.empty(spec.shape, spec.dtype)
            array[places] = coded.main
            rest = np.ones(spec.shape[0], bool)
            rest[places] = False
            if rest.any():
                if held is None or not len(held[0]):
                    raise RejectedMessageError(f"{self.name}: rows that are not sent were never sent before")
                names, values, _ = held
                at = np.searchsorted(names, rows[rest])
                at[at == len(names)] = 0
                if (names[at] != rows[rest]).any():
                    raise RejectedMessageError(
                        f"{self.name}: rows that are not sent were never sent before, or have expired"
                    )
                array[rest] = values[at]
        if rows is not None:
            self._keep(turn, held, rows[places], array[places])
        return array

    def _held(self, turn: CodecContext, shape: tuple[int, ...], dtype: np.dtype) -> tuple | None:
        """Return names, values and rounds of the entries that have not expired; None when they are of other rows."""
        values = turn.kept.get("values")
        if values is None or values.shape[1:] != shape or values.dtype != dtype:
            return None
        fresh = turn.round - turn.kept["sent"] < self.expiry
        return turn.kept["names"][fresh], values[fresh], turn.kept["sent"][fresh]

    def _keep(self, turn: CodecContext, held: tuple | None, names: np.ndarray, values: np.ndarray) -> None:
        """Remember rows that were sent now, in place of older entries."""
        sent = np.full(len(names), turn.round, np.int64)
        if held is not None:
            old = ~np.isin(held[0], names)
            names, values, sent = (np.concatenate([kept[old], new]) for kept, new in zip(held, (names, values, sent)))
        order = np.argsort(names, kind="stable")
        turn.draft.update(
            names=names[order], values=values[order], sent=sent[order], number=turn.kept.get("number", 0) + 1
        )


def _rows(turn: CodecContext, count: int) -> np.ndarray | None:
    """The names of `count` rows as int64; None when they do not tell the rows apart."""
    if turn.rows is None:
        return np.arange(count)
    if len(turn.rows) != count or len(np.unique(turn.rows)) != count:
        return None
    return turn.rows.astype(np.int64)
