"""Runs that take long, made once for all workers of a test run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, proof: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first worker to ask for it fills, while the others wait.

    Args:
        factory: of this worker.
        name: of the folder.
        proof: the file that is there when the folder is full.
        make: fills the folder, which is new and empty, or left by a worker that failed.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    folder = factory.getbasetemp().parent / name
    with FileLock(f"{folder}.lock"):
        if not (folder / proof).is_file():
            folder.mkdir(exist_ok=True)
            make(folder)
    return folder
