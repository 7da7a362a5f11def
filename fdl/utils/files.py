"""Atomic writing of files, without importing torch."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fdl.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: at any moment, either the old content or all of the new content is on disk.

    Args:
        path: the file; its folder is created if missing.
        data: the new content.

    Raises:
        UserError: the file cannot be written; an existing file is left untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    # two processes may write the same file: each needs a temporary file of its own
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
        os.fsync(folder)  # the new directory entry must survive a power cut, too
    finally:
        os.close(folder)
