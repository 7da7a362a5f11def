"""Atomic checkpoints: a run that is killed at any moment resumes from its last valid one.

A checkpoint is one safetensors file. Tensors are stored under the path of the keys that lead to them, everything else
as JSON in a tensor of its own; nothing is pickled. The file's name carries a digest of its bytes, so that a truncated
or altered file is recognised before its contents are trusted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from fdl.errors import UserError
from fdl.state.run_folder import checkpoints
from fdl.utils.files import write_atomically

JSON = "__json__"
"""Name of the tensor that holds everything but tensors, as JSON."""
_TENSOR = "__tensor__"

_ALIGNMENT = 64
"""Bytes: torch's allocator for host memory returns addresses that are multiples of it."""


def write_round(folder: Path, round: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write the state after a round; older checkpoints are deleted only once the new one is safe on disk.

    Args:
        folder: the run's checkpoint folder, created if absent.
        round: the round that has ended, 0 for the state before the first.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None. Keys are strings.
        keep: number of checkpoints to keep, the new one included.

    Returns:
        The path of the new file.

    Raises:
        UserError: the file cannot be written; existing checkpoints are untouched.
    """
    data = to_bytes(state)
    path = folder / f"round-{round:06d}-{content_digest(data)}.safetensors"
    write_atomically(path, data)
    for old in files(folder)[keep:]:
        if old != path:
            old.unlink(missing_ok=True)
    for rest in folder.glob(".round-*.partial"):  # of a run that was killed while it wrote
        rest.unlink(missing_ok=True)
    return path


def load_round(folder: Path, round: int) -> dict[str, Any] | None:
    """Read the checkpoint of a round; None if it is missing or damaged."""
    for path in (path for path, number in checkpoints(folder).items() if number == round):
        try:
            return from_bytes(_whole(path))
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    return None


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """Read the newest valid checkpoint.

    Args:
        folder: the run's checkpoint folder.

    Returns:
        The state, the file it was read from, and one sentence per newer file that is damaged.

    Raises:
        UserError: there is no valid checkpoint.
    """
    damaged: list[str] = []
    for path in files(folder):
        try:
            return from_bytes(_whole(path)), path, damaged
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            damaged.append(f"{path}: damaged checkpoint passed over: {error}")
    raise UserError("\n".join([f"{folder}: there is no checkpoint to resume from", *damaged]))


def write_best(path: Path, round: int, student: Mapping[str, torch.Tensor], beside: Mapping[str, Any]) -> None:
    """Write the student of the best round so far, replacing the previous one.

    Args:
        path: the file.
        round: the round.
        student: its weights by name.
        beside: the part of the server's state that belongs to the student.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    write_atomically(path, to_bytes({"round": round, "student": dict(student), "server": beside}))


def load_best(path: Path) -> dict[str, Any]:
    """Read a file of `write_best`: ``round``, ``student`` and ``server``.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        state = from_bytes(path.read_bytes())
        return {key: state[key] for key in ("round", "student", "server")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def round_of(path: Path) -> int | None:
    """Read the round of a file of `write_best`, without the weights; None if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(bytes(file.get_tensor(JSON).numpy()))["round"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def exists(folder: Path) -> bool:
    """Return True if a folder holds a checkpoint, valid or not."""
    return bool(files(folder))


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """Serialise a nested state to the bytes of a safetensors file.

    Args:
        state: as for `write_round`.

    Raises:
        TypeError: a key is not a string, or a value has another type than those of `write_round`.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            # tied weights share their memory: stored once, and both names refer to it
            key = _place(value) if value.numel() else (path,)
            if key not in seen:
                seen[key] = path
                tensors[path] = value.detach().cpu().contiguous()
            return {_TENSOR: seen[key]}
        if isinstance(value, Mapping):
            if not all(isinstance(k, str) for k in value):
                raise TypeError(f"{path}: the keys of a state must be strings")
            return {k: strip(v, f"{path}/{k}" if path else k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [strip(v, f"{path}/{i}") for i, v in enumerate(value)]
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise TypeError(f"{path}: a state cannot hold {type(value).__name__}")

    text = json.dumps(strip(state, ""), separators=(",", ":")).encode()
    tensors[JSON] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return safetensors.torch.save(_unshared(tensors))


def from_bytes(data: bytes) -> dict[str, Any]:
    """Restore the nested state from the bytes of `to_bytes`; tuples come back as lists."""
    return _filled(safetensors.torch.load(data))


def from_file(path: Path) -> dict[str, Any]:
    """Restore the nested state from a file with the bytes of `to_bytes`, which is memory-mapped."""
    return _filled(safetensors.torch.load_file(path))


def as_saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as it comes back from a file, so that a run and its resumption compute the same bits.

    A tensor's memory layout decides which kernel processes it, and with that the last bits of results. Files keep
    values, but no strides, addresses or devices; so a state that stays in memory must be normalised, too.

    Args:
        state: as for `write_round`.

    Returns:
        The same values as contiguous tensors in host memory, aligned as new ones are, with lists instead of tuples.
        Tensors that already are like this are not copied; tied ones stay tied.
    """
    seen: dict[tuple[Any, ...], torch.Tensor] = {}

    def settle(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = _place(value)
            if key not in seen:
                seen[key] = _aligned(value.detach().cpu().contiguous())
            return seen[key]
        if isinstance(value, Mapping):
            return {k: settle(v) for k, v in value.items()}
        return [settle(v) for v in value] if isinstance(value, list | tuple) else value

    return settle(state)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key of a tensor's memory and layout, which tied weights share."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a contiguous tensor unless it is aligned like torch's own; views and mapped files may start anywhere."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _filled(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    state = json.loads(tensors.pop(JSON).numpy().tobytes())
    tensors = {name: _aligned(tensor) for name, tensor in tensors.items()}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[_TENSOR]] if _TENSOR in value else {k: fill(v) for k, v in value.items()}
        return [fill(v) for v in value] if isinstance(value, list) else value

    return fill(state)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share a storage, which safetensors refuses to store."""
    owners: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if tensor.numel() and pointer in owners else tensor
        owners.add(pointer)
    return result


def _whole(path: Path) -> bytes:
    """Read the bytes of a checkpoint.

    Raises:
        ValueError: they do not match the digest in the file's name.
    """
    data = path.read_bytes()
    if content_digest(data) != path.stem.rsplit("-", 1)[-1]:
        raise ValueError("its bytes do not match the digest in its name")
    return data


def files(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest first."""
    return list(checkpoints(folder))


def content_digest(data: bytes) -> str:
    """Return a hash of some bytes: sixteen hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
