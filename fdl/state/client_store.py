"""Clients' states on disk, so that memory does not grow with the number of clients."""

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
"""Names that a store gives; of other files in its folder it knows nothing."""

CLIENTS = "clients"
"""The store's folder in the run's own."""

STATE_FILE = "__file__"
"""Key under which a checkpoint names a client's file instead of its state."""


class DiskStore:
    """One safetensors file per client, a new one whenever its state has changed.

    A file's name carries a digest of its bytes. Files that a kept checkpoint names stay, so a run can go back to any
    of them; all others go once a newer one is there. Several processes may share the folder, each writing the clients
    that it has.

    Args:
        folder: where the files lie; made when the first is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[int, str] = {}
        self._fresh: set[str] = set()  # written since the last checkpoint, so named by none
        self._retained: dict[Path, set[str]] = {}

    def write(self, client: int, state: Mapping[str, Any]) -> None:
        """Keep a client's state; nothing is written where it is as it was.

        Raises:
            UserError: when the disk refuses.
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
        """Return a client's newest state, empty where it has none.

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
        """What a checkpoint keeps of a client: the name of its file, nothing where it has none."""
        return {STATE_FILE: self._names[client]} if client in self._names else {}

    def set_reference(self, client: int, saved: Mapping[str, Any]) -> None:
        """Go back to what `reference` gave, or begin with the state itself, which a checkpoint may hold as well."""
        self._names.pop(client, None)
        if STATE_FILE in saved:
            self._names[client] = Path(str(saved[STATE_FILE])).name
        else:
            self.write(client, saved)

    def mark_checkpointed(self) -> None:
        """Note that a checkpoint names all files that are the newest now."""
        self._fresh.clear()

    def retain(self, checkpoints: Iterable[Path], sweep: bool = False) -> None:
        """Keep the files that these checkpoints name; those that only others named go.

        Args:
            checkpoints: all that are kept, the newest of which names the newest states.
            sweep: drop whatever none of them names, which a run that was killed may have left.
        """
        before = set().union(*self._retained.values())
        self._retained = {path: self._retained.get(path) or _named(path) for path in checkpoints}
        if sweep and self.folder.is_dir():
            before = {file.name for file in self.folder.iterdir() if STORE_FILES.fullmatch(file.name)}
        for name in before.difference(*self._retained.values()):
            (self.folder / name).unlink(missing_ok=True)


def resolve(saved: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The state that a checkpoint names or holds, for a run that keeps its clients in memory."""
    if STATE_FILE not in saved:
        return dict(saved)
    store = DiskStore(folder)
    store.set_reference(0, saved)
    return store.read(0)


def _named(path: Path) -> set[str]:
    """The clients' files that a checkpoint names."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(bytes(file.get_tensor(checkpoint.JSON).to(torch.uint8).numpy()))
    except (OSError, ValueError, SafetensorError):  # a damaged one is never gone back to
        return set()
    return {str(saved[STATE_FILE]) for saved in state.get("clients", {}).values() if STATE_FILE in saved}
