"""Codes for a sorted subset of n positions, in as few bytes as two simple codes allow."""

from __future__ import annotations

import numpy as np

from fdl.errors import RejectedMessageError


def encode(places: np.ndarray, count: int) -> np.ndarray:
    """Return a rising choice of places among `count` as bytes (uint8), by the code that is shorter.

    Either one bit a place, or the distances between chosen places in groups of 7 bits, the lowest first. The two are
    told apart by their length: distances are sent only where they are shorter than the bits.

    Example:
        >>> import numpy as np
        >>> encode(np.array([3, 100]), count=1000)  # distances: 3 places before the first, 96 before the second
        array([ 3, 96], dtype=uint8)
        >>> encode(np.array([0, 1, 2]), count=8)  # one bit per place
        array([7], dtype=uint8)
    """
    gaps = np.diff(places, prepend=-1) - 1
    lengths = [int((gaps >= 1 << 7 * group).sum()) for group in range(1, -(-int(count).bit_length() // 7))]
    if len(places) + sum(lengths) >= -(-count // 8):
        chosen = np.zeros(count, bool)
        chosen[places] = True
        return np.packbits(chosen, bitorder="little")
    if not any(lengths):
        return gaps.astype(np.uint8)
    groups = gaps[:, None] >> (7 * np.arange(len(lengths) + 1))
    used = groups > 0
    used[:, 0] = True
    groups &= 127
    groups[:, :-1] |= 128 * used[:, 1:]
    return groups[used].astype(np.uint8)


def decode(data: np.ndarray, chosen: int, count: int) -> np.ndarray:
    """Return the places (int64, rising) that `encode` was given.

    Args:
        data: uint8; its length has been checked with `fits`.
        chosen: how many places they are.
        count: among how many.

    Raises:
        RefusedError: the bytes hold no such choice.

    Example:
        >>> import numpy as np
        >>> decode(np.uint8([3, 96]), chosen=2, count=1000)
        array([  3, 100])
    """
    if data.size == -(-count // 8):
        places = np.flatnonzero(np.unpackbits(data, bitorder="little"))
    else:
        last = data < 128
        if data.size and not last[-1]:
            raise RejectedMessageError("places that are cut short")
        ends = np.flatnonzero(last)
        starts = np.concatenate([[0], ends + 1])[:-1]
        if (ends - starts > 8).any():
            raise RejectedMessageError("a place of more than 63 bits")
        shifts = 7 * (np.arange(data.size) - np.repeat(starts, np.diff(ends, prepend=-1)))
        values = (data & 127).astype(np.int64) << shifts
        gaps = np.add.reduceat(values, starts) if starts.size else values
        if (gaps >= count).any():  # also keeps the sum from overflowing
            raise RejectedMessageError(f"a place beyond the last of {count}")
        places = np.cumsum(gaps + 1) - 1
    if places.size != chosen or (chosen and places[-1] >= count):
        raise RejectedMessageError(f"places that are not {chosen} of {count}")
    return places


def fits(size: int, chosen: int, count: int) -> bool:
    """Return True if the choice of `chosen` places among `count` may take so many bytes.

    Example:
        >>> fits(2, chosen=2, count=1000), fits(1, chosen=2, count=1000)
        (True, False)
    """
    return chosen <= count and (size == -(-count // 8) or chosen <= size < -(-count // 8))
