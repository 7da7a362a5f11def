"""Files that are whole or not there. Nothing here imports torch."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fdl.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment either the old or the whole new one is there.

    Args:
        path: the file; its folder is made when absent.
        data: its bytes.

    Raises:
        UserError: when the disk refuses; what was there is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    # two processes may write the same: each by itself, so that neither takes the other's file away
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, must survive a power cut
    finally:
        os.close(folder)
