"""The bytes of one message.

    magic     3   b"FDL"
    version   1
    crc32     4   of everything after it
    code      1   type of the message
    client    4   who sent it, or whom it is for; `BROADCAST` when it is for every client
    round     4
    length    8   bytes after the header
    meta          count, then for each: name, type, value
    arrays        see fdl.comm.codec

Where messages are authenticated, a tag of 16 bytes follows (fdl.comm.authentication).

All integers are little-endian. Nothing in it is executed or unpickled.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from fdl.comm.binary import Reader, crc32, text, varint
from fdl.comm.codec import Codec
from fdl.errors import RejectedMessageError
from fdl.messages import Message, Meta, message_type, private_features, sparse_responses  # noqa: F401  a type of message is known once its module is imported

if TYPE_CHECKING:
    from fdl.comm.fallback import CodecFallbacks
    from fdl.comm.link_state import LinkState

#: Stands in the header for the client's id of a message that goes to every client.
BROADCAST = 0xFFFFFFFF

_MAGIC = b"FDL\x01"
_HEADER = struct.Struct("<4sIBIIQ")
_FIELDS = struct.Struct("<BIIQ")
_FLOAT32, _FLOAT64 = struct.Struct("<f"), struct.Struct("<d")
_MAX_META = 64
_FOREIGN = "not a message of this version of fdl"
_SUMMED = len(_MAGIC) + 4
HEADER = _HEADER.size


def pack(
    message: Message,
    codec: Codec,
    *,
    client: int,
    round: int,
    rng: np.random.Generator | None = None,
    memory: LinkState | None = None,
) -> bytes:
    """Return the bytes of a message.

    Args:
        message: what to send; it is not validated, the receiver does that.
        codec: the chain to encode the arrays with.
        client: id of the sending or receiving client, or `BROADCAST`.
        round: 0 … 2**32 - 1.
        rng: source of rounding noise, needed when `codec.draws`.
        memory: the sender's, for a chain that remembers.

    Raises:
        UserError: a tensor has a dtype that cannot be sent.
    """
    meta = _encode_meta(message.meta())
    buffers, size = codec.chunks(message.fields(), rng, round, memory)
    fields = _FIELDS.pack(message.code, client, round, len(meta) + size)
    checksum = crc32(meta, crc32(fields))
    for buffer in buffers:
        checksum = crc32(buffer, checksum)
    return b"".join([_MAGIC, checksum.to_bytes(4, "little"), fields, meta, *buffers])


def unpack(
    data: bytes | memoryview,
    codec: Codec | CodecFallbacks,
    *,
    limit: int,
    client: int,
    round: int,
    memory: LinkState | None = None,
    intact: bool = False,
) -> Message:
    """Return the valid message that the bytes hold.

    Args:
        data: what `pack` returned, as it was received.
        codec: an equal chain to the sender's, or the ladder that it was chosen from.
        limit: most bytes that the decoded arrays may have together.
        client: whose message this must be.
        round: the round that it must belong to.
        memory: the receiver's, for a chain that remembers; the message is in its draft until it is committed.
        intact: these are the very bytes that `pack` made here, so that their checksum need not be taken again.

    Raises:
        RefusedError: the bytes are damaged, belong to another client or round, or hold an unusable message.
    """
    if len(data) < HEADER:
        raise RejectedMessageError("cut short" if _MAGIC.startswith(bytes(data[:4])) else _FOREIGN)
    magic, checksum, code, of_client, of_round, length = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise RejectedMessageError(_FOREIGN)
    view = memoryview(data)
    if not intact and crc32(view[_SUMMED:]) != checksum:
        raise RejectedMessageError("checksum does not match: the message was damaged on its way")
    if of_client != client:
        raise RejectedMessageError(f"message of {_who(of_client)} where one of {_who(client)} was due")
    if of_round != round:
        raise RejectedMessageError(f"message of round {of_round} in round {round}")
    if length != len(data) - HEADER:
        raise RejectedMessageError(f"{length} bytes announced, {len(data) - HEADER} received")
    kind = message_type(code)
    reader = Reader(view[HEADER:])
    meta = _decode_meta(reader)
    message = kind.build(codec.decode(reader.rest(), limit, round, memory), meta)
    message.validate()
    return message


def _who(client: int) -> str:
    return "the server to all" if client == BROADCAST else f"client {client}"


def _encode_meta(meta: Meta) -> bytes:
    parts = [varint(len(meta))]
    for name, value in meta.items():
        parts.append(text(name))
        if isinstance(value, int):
            parts.append(b"i" + varint(2 * value if value >= 0 else -2 * value - 1))
        elif isinstance(value, float):
            short = abs(value) < 3e38 and _FLOAT32.unpack(_FLOAT32.pack(value))[0] == value
            parts.append(b"f" + _FLOAT32.pack(value) if short else b"d" + _FLOAT64.pack(value))
        else:
            parts.append(b"s" + text(value))
    return b"".join(parts)


def _decode_meta(reader: Reader) -> Meta:
    meta: Meta = {}
    count = reader.varint()
    if count > _MAX_META:
        raise RejectedMessageError(f"{count} numbers announced, the most is {_MAX_META}")
    for _ in range(count):
        name, kind = reader.text(), reader.byte()
        read = _META_READERS.get(kind)
        if read is None or name in meta:
            raise RejectedMessageError("a number of unknown type, or sent twice")
        meta[name] = read(reader)
    return meta


def _read_integer(reader: Reader) -> int:
    value = reader.varint()
    return -(value >> 1) - 1 if value & 1 else value >> 1


_META_READERS = {
    ord("i"): _read_integer,
    ord("f"): lambda reader: _FLOAT32.unpack(reader.take(4))[0],
    ord("d"): lambda reader: _FLOAT64.unpack(reader.take(8))[0],
    ord("s"): Reader.text,
}
