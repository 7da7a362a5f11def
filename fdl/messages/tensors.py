"""Named groups of tensors as a message, for algorithms that need no type of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fdl.errors import RejectedMessageError, UserError
from fdl.messages.base import Message, Meta, kind_owner
from fdl.messages.serialization import (
    check_finite,
    check_sample_count,
    pop_meta,
    reject_leftovers,
    take_samples,
    to_numpy,
    to_torch,
)

MAX_METADATA = 1 << 12
"""Most bytes of the metadata as JSON."""

MAX_GROUPS = 256
"""Most groups of one message."""

_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")
_EMPTY = "empty"


@dataclass(frozen=True, eq=False)
class TensorMessage(Message):
    """Groups of named tensors, with a few numbers next to them.

    A method that sends anything but weights, responses, features or prototypes alone need not define a message class:
    SCAFFOLD, say, sends ``TensorMessage({"weights": w, "control": c}, kind="scaffold", samples=n)``. The message is
    encoded, delta-coded, validated and counted as any other; tensors of real numbers pass through the channel's codec,
    integers and booleans cross every chain unchanged.

    Attributes:
        groups: tensors by name, by group. The name of a group is not empty and holds no slash; names of tensors are
            free. Dtypes and shapes may be any that a codec sends; a group may be empty. At most 256 groups.
        samples: number of examples that the sender trained on, 0 if it does not report it; what `WeightedMean` weights
            by.
        kind: name in the ledger of bytes, of lower-case letters, digits and underscores, at most 32 of them. Messages
            of different kinds are delta-coded independently of each other.
        metadata: whatever JSON can express, at most 4,096 bytes of it.
    """

    code: ClassVar[int] = 9

    groups: Mapping[str, Mapping[str, Tensor]]
    samples: int = 0
    kind: str = "tensors"  # type: ignore[misc]  # per message here, and per class in all other types
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, np.ndarray]:
        """Return one array per tensor, named ``group/tensor``.

        Raises:
            UserError: kind, metadata or the name of a group cannot be sent, or a value is no tensor.
        """
        self._require_sendable()
        fields = {}
        for group, tensors in self.groups.items():
            for name, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise UserError(f"{self.kind}: {group!r} holds a {type(tensor).__name__} {name!r}, not a tensor")
                fields[f"{group}/{name}"] = to_numpy(f"{group}/{name}", tensor)
        return fields

    def meta(self) -> Meta:
        """Return the kind; sample count, names of empty groups and metadata where there are any.

        Raises:
            UserError: kind, metadata or the name of a group cannot be sent.
        """
        self._require_sendable()
        meta: Meta = {"kind": self.kind}
        if self.samples:
            meta["samples"] = int(self.samples)
        if empty := [group for group, tensors in self.groups.items() if not tensors]:
            meta[_EMPTY] = "/".join(empty)
        if self.metadata:
            meta["metadata"] = _dumps(self.metadata)
        return meta

    @classmethod
    def build(cls, fields: Mapping[str, np.ndarray], meta: Meta) -> TensorMessage:
        """Build the message from `fields` and `meta`, groups ordered by first tensors, empty ones last."""
        meta = dict(meta)
        kind = pop_meta(meta, "kind", str)
        samples = take_samples(meta)
        empty = pop_meta(meta, _EMPTY, str).split("/", MAX_GROUPS) if _EMPTY in meta else []
        metadata = _loads(pop_meta(meta, "metadata", str)) if "metadata" in meta else {}
        reject_leftovers(meta)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, array in fields.items():
            group, slash, tensor = name.partition("/")
            if not slash:
                raise RejectedMessageError(f"tensor {name!r:.80} belongs to no group")
            groups.setdefault(group, {})[tensor] = to_torch(array)
        for group in empty:
            if groups.setdefault(group, {}):
                raise RejectedMessageError(f"group {group!r:.80} is said to be empty")
        return cls(groups, samples, kind, metadata)

    def validate(self) -> None:
        """Check names, metadata and sample count, and that every number is finite."""
        if fault := self._fault():
            raise RejectedMessageError(fault)
        check_sample_count(self.samples)
        for group, tensors in self.groups.items():
            for name, tensor in tensors.items():
                check_finite(f"tensor {f'{group}/{name}'!r}", tensor)

    def _require_sendable(self) -> None:
        if fault := self._fault():
            raise UserError(f"{type(self).__name__}: {fault}")

    def _fault(self) -> str:
        """Return the reason why the message's head cannot be sent; an empty string if it can."""
        if not isinstance(self.kind, str) or not _KIND.fullmatch(self.kind):
            return f"kind {self.kind!r:.80} is not 1 to 32 lower-case letters, digits and underscores"
        if (owner := kind_owner(self.kind)) is not None and owner is not type(self):
            return f"kind {self.kind!r} is that of {owner.__name__}; choose another name"
        if len(self.groups) > MAX_GROUPS:
            return f"{len(self.groups)} groups, at most {MAX_GROUPS} are sent"
        for group in self.groups:
            if not isinstance(group, str) or not group or "/" in group:
                return f"{group!r:.80} cannot name a group: it is empty, holds a slash or is no string"
        try:
            size = len(_dumps(self.metadata)) if self.metadata else 0
        except (TypeError, ValueError, RecursionError) as error:
            return f"metadata cannot be written as JSON: {error}"
        return f"metadata takes {size} bytes as JSON, at most {MAX_METADATA} are sent" if size > MAX_METADATA else ""


def _dumps(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), allow_nan=False, separators=(",", ":"))


def _loads(text: str) -> dict[str, Any]:
    """Read received metadata, as long as it is a small JSON object of finite numbers."""
    if len(text) > MAX_METADATA:
        raise RejectedMessageError(f"metadata of {len(text)} characters, at most {MAX_METADATA} are taken")
    try:
        metadata = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise RejectedMessageError("metadata is not valid JSON") from None
    if not isinstance(metadata, dict):
        raise RejectedMessageError("metadata is not a JSON object")
    return metadata


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
