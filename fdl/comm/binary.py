"""The smallest pieces of the wire format: unsigned integers of few bytes, and a reader that trusts no length."""

from __future__ import annotations

from fdl.errors import RejectedMessageError

try:  # the same checksum, an order of magnitude faster: it is taken of every byte that is sent
    from isal.isal_zlib import crc32
except ImportError:  # not built for every processor
    from zlib import crc32

__all__ = ["Reader", "crc32", "text", "varint"]


def varint(value: int) -> bytes:
    """Encode an integer in [0, 2**64) in 7-bit groups, the lowest first: one byte below 128.

    Example:
        >>> varint(5).hex(), varint(300).hex()
        ('05', 'ac02')
    """
    if value < 128:
        return bytes((value,))
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    groups.append(value)
    return bytes(groups)


class Reader:
    """Reads a received buffer from its start, and refuses to read past its end.

    Example:
        >>> reader = Reader(varint(300) + text("up"))
        >>> reader.varint(), reader.text(), reader.left
        (300, 'up', 0)
    """

    def __init__(self, data: bytes | memoryview):
        self._data, self._position, self._end = memoryview(data), 0, len(data)

    @property
    def left(self) -> int:
        """The bytes that have not been read yet."""
        return self._end - self._position

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes without copying them.

        Raises:
            RefusedError: fewer are left.
        """
        start = self._position
        if count > self._end - start:
            raise RejectedMessageError(f"cut short: {count} bytes announced, {self._end - start} left")
        self._position = start + count
        return self._data[start : start + count]

    def rest(self) -> memoryview:
        """Return all that is left, without copying it."""
        start, self._position = self._position, self._end
        return self._data[start:]

    def byte(self) -> int:
        """Return the next byte as a number."""
        position = self._position
        if position >= self._end:
            raise RejectedMessageError("cut short")
        self._position = position + 1
        return self._data[position]

    def varint(self) -> int:
        """Return the next integer that `varint` encoded."""
        value, shift = 0, 0
        while True:
            group = self.byte()
            value |= (group & 127) << shift
            if group < 128:
                break
            shift += 7
            if shift > 63:
                raise RejectedMessageError("an integer of more than 64 bits")
        if value >> 64:
            raise RejectedMessageError("an integer of more than 64 bits")
        return value

    def text(self) -> str:
        """Return the next string: its length in bytes, then UTF-8."""
        try:
            return str(self.take(self.varint()), "utf-8")
        except UnicodeDecodeError:
            raise RejectedMessageError("a name that is not UTF-8") from None

    def finish(self) -> None:
        """Check that nothing is left."""
        if self.left:
            raise RejectedMessageError(f"{self.left} bytes too many")


def text(value: str) -> bytes:
    """Encode a string as `Reader.text` reads it.

    Example:
        >>> text("up").hex()
        '027570'
    """
    encoded = value.encode()
    return varint(len(encoded)) + encoded
