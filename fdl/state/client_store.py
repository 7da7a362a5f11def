"""Client states on disk, so that memory does not grow with the number of clients."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fdl.errors import UserError
from fdl.state import checkpoint
from fdl.state.run_folder import CLIENT

STORE_FILES = re.compile(rf"{CLIENT.pattern}|\.client-.*\.partial")
"""Names of a store's files; other files in its folder are never touched."""

CLIENTS = "clients"
"""The store's folder within the run's folder."""

STATE_FILE = "__file__"
"""Key under which a checkpoint names a client's file instead of holding its state."""


class DiskStore:
    """One safetensors file per client, a new one whenever its state has changed.

    A file's name carries a digest of its bytes. Files that a kept checkpoint names are kept, so that a run can resume
    from any of these checkpoints; all others are deleted once a newer one is written. Several processes may share the
    folder, each writing its own clients.

    Args:
        folder: folder of the files; created when the first one is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[int, str] = {}
        self._fresh: set[str] = set()  # written since the last checkpoint, so named by none
        self._retained: dict[Path, set[str]] = {}

    def write(self, client: int, state: Mapping[str, Any]) -> None:
        """Write a client's state, unless it is empty or has not changed.

        Args:
            client: the client's id.
            state: as for `fdl.state.checkpoint.write_round`.

        Raises:
            UserError: the file cannot be written.
        """
        if not state:
            return
        data = checkpoint.to_bytes(state)
        name = f"client-{client:06d}-{checkpoint.content_digest(data)}.safetensors"
        before = self._names.get(client)
        if name == before:
            return
        checkpoint.write_atomically(self.folder / name, data)
        self._names[client] = name
        if before in self._fresh:
            self._fresh.discard(before)
            (self.folder / before).unlink(missing_ok=True)
        self._fresh.add(name)

    def read(self, client: int) -> dict[str, Any]:
        """Return a client's newest state, empty if it has none.

        Args:
            client: the client's id.

        Raises:
            UserError: the file is missing or damaged.
        """
        name = self._names.get(client)
        if name is None:
            return {}
        try:
            return checkpoint.from_file(self.folder / name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{self.folder / name}: the state of client {client} cannot be read: {error}") from error

    def reference(self, client: int) -> dict[str, Any]:
        """Return what a checkpoint stores for a client: the name of its file; empty if it has none."""
        return {STATE_FILE: self._names[client]} if client in self._names else {}

    def set_reference(self, client: int, saved: Mapping[str, Any]) -> None:
        """Restore a client's state from what a checkpoint stores for it.

        Args:
            client: the client's id.
            saved: the result of `reference`; or the state itself, from a run that kept it in memory.
        """
        self._names.pop(client, None)
        if STATE_FILE in saved:
            self._names[client] = Path(str(saved[STATE_FILE])).name
        else:
            self.write(client, saved)

    def mark_checkpointed(self) -> None:
        """Record that a checkpoint names the newest file of every client."""
        self._fresh.clear()

    def retain(self, checkpoints: Iterable[Path], sweep: bool = False) -> None:
        """Keep the files that these checkpoints name, and delete those that only dropped checkpoints named.

        Args:
            checkpoints: all that are kept; the newest one names the newest states.
            sweep: delete every other file of the store, too, which a killed run may have left.
        """
        before = set().union(*self._retained.values())
        self._retained = {path: self._retained.get(path) or _named(path) for path in checkpoints}
        if sweep and self.folder.is_dir():
            before = {file.name for file in self.folder.iterdir() if STORE_FILES.fullmatch(file.name)}
        for name in before.difference(*self._retained.values()):
            (self.folder / name).unlink(missing_ok=True)


def resolve(saved: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the state that a checkpoint names or holds, for a run that keeps client states in memory.

    Args:
        saved: what the checkpoint stores for the client.
        folder: folder of the store whose file it may name.

    Raises:
        UserError: that file is missing or damaged.
    """
    if STATE_FILE not in saved:
        return dict(saved)
    store = DiskStore(folder)
    store.set_reference(0, saved)
    return store.read(0)


def _named(path: Path) -> set[str]:
    """Return the client files that a checkpoint names."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(bytes(file.get_tensor(checkpoint.JSON).to(torch.uint8).numpy()))
    except (OSError, ValueError, SafetensorError):  # no run resumes from a damaged one
        return set()
    return {str(saved[STATE_FILE]) for saved in state.get("clients", {}).values() if STATE_FILE in saved}
