"""A participant's state between its turns: in memory, or on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdl.state import checkpoint
from fdl.state.client_store import DiskStore, resolve


class OffloadedState:
    """One client's state, which a store may keep on disk between turns.

    Args:
        store: keeps the state between turns; None keeps it in memory.
        id: the client's id.
    """

    def __init__(self, store: DiskStore | None, id: int):
        self._store, self._id = store, id
        self._state: dict[str, Any] | None = None

    @property
    def in_memory(self) -> bool:
        """True while the state is held in memory."""
        return self._state is not None

    @property
    def value(self) -> dict[str, Any]:
        """The state, read from the store at the first access after `offload`."""
        if self._state is None:
            self._state = {} if self._store is None else self._store.read(self._id)
        return self._state

    @value.setter
    def value(self, state: dict[str, Any]) -> None:
        self._state = state

    def offload(self, changed: bool = True) -> bool:
        """Write the state to the store; without a store, normalise it to what a file would restore.

        Args:
            changed: False if the state was only read.

        Returns:
            True if the state has left memory.
        """
        if self._state is None:
            return False
        if self._store is None:
            self._state = checkpoint.as_saved(self._state) if changed else self._state
            return False
        if changed:
            self._store.write(self._id, self._state)
        self._state = None
        return True

    def to_checkpoint(self) -> dict[str, Any]:
        """Return what a checkpoint stores for the client: its state, or a reference to its file."""
        return self.value if self._store is None else self._store.reference(self._id)

    def from_checkpoint(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Restore the result of `to_checkpoint`.

        Args:
            saved: the state, or the reference to its file.
            folder: folder of the file that a reference names.
        """
        if self._store is None:
            self._state = resolve(saved, folder)
        else:
            self._store.set_reference(self._id, saved)
            self._state = None
