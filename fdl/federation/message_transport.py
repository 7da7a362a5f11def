"""Lossless transport of messages between ranks, without validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fdl.comm.codec import Codec
from fdl.messages import Bundle, Message, message_type

_PLAIN = Codec([])


def to_tensors(message: Message | Bundle) -> dict[str, Any]:
    """Convert a message to tensors and numbers, even one that the server would reject.

    Args:
        message: the message.

    Returns:
        A nested state that `fdl.state.checkpoint.to_bytes` accepts.
    """
    bundled = isinstance(message, Bundle)
    parts = message.parts if bundled else (message,)
    fields = [torch.frombuffer(bytearray(_PLAIN.encode(part.fields())), dtype=torch.uint8) for part in parts]
    heads = [{"code": part.code, "meta": part.meta()} for part in parts]
    return {"bundled": bundled, "heads": heads, "fields": fields}


def from_tensors(parcel: Mapping[str, Any]) -> Message | Bundle:
    """Restore a message from the result of `to_tensors`.

    Args:
        parcel: that result.
    """
    parts = tuple(
        message_type(head["code"]).build(_PLAIN.decode(fields.numpy().tobytes(), limit=1 << 62), head["meta"])
        for head, fields in zip(parcel["heads"], parcel["fields"])
    )
    return Bundle(parts) if parcel["bundled"] else parts[0]
