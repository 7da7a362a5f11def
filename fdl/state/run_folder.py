"""A run's folder: the files that fdl wrote into it, and their replacement by a new run. Nothing imports torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fdl.errors import UserError
from fdl.utils.files import write_atomically
from fdl.utils.locks import LOCK

RECIPE, SUMMARY, CHECKPOINTS, AUDIT, COMPARE = "recipe.yaml", "summary.json", "checkpoints", "audit.json", "compare"
INPUTS, TOKENIZER = "inputs.json", "tokenizer"
"""The description of the models' inputs, and the folder of a tokenizer that has no name of its own."""

MARK = ".fdl.json"
"""The file that marks a folder as created by fdl, with its purpose."""

REPLACED = ".replaced"
"""Folder of an earlier run's files until the run that replaces it has finished a round and saved it."""

CHECKPOINT = re.compile(r"round-(\d{6,})-[0-9a-f]{16}\.safetensors")
"""The name of a checkpoint."""

CLIENT = re.compile(r"client-\d{6,}-[0-9a-f]{16}\.safetensors")
"""The name of a client's state file."""

_MOVING = ".replacing"
"""The same folder while files are moved there or back: everything in it belongs to the run's folder."""

_EVENTS = re.compile(r"events\.out\.tfevents\..+|.+\.pt\.trace\.json(\.gz)?")
_OWN = {
    "": re.compile(
        r"recipe\.yaml|summary\.json|audit(-\d+)?\.json|metrics\.csv|best(-before)?\.safetensors|profile\.txt"
        r"|inputs\.json|\.(recipe|summary|audit|metrics|best|profile|inputs)\..*\.partial"
    ),
    TOKENIZER: re.compile(r"[\w.-]+\.(json|txt|model|jinja)"),
    CHECKPOINTS: re.compile(rf"{CHECKPOINT.pattern}|\.round-.*\.partial"),
    "clients": re.compile(rf"{CLIENT.pattern}|\.client-.*\.partial"),
    "tensorboard": _EVENTS,
    "tensorboard/audit": _EVENTS,
}
"""Files that a run writes, by subfolder of its folder."""

_NAMED = 8


def own_files(folder: Path) -> Iterator[Path]:
    """List the files in a run's folder that fdl wrote, exports included; all others belong to the user."""
    for place, pattern in _OWN.items():
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted((folder / place).iterdir()):
                if pattern.fullmatch(path.name) and not (path.is_dir() and not path.is_symlink()):
                    yield path
    for audit in sorted((folder / "tensorboard").glob("audit-*")):
        yield from (path for path in sorted(audit.iterdir()) if _EVENTS.fullmatch(path.name))
    for name in read_mark(folder).get("exports", []):
        if not os.path.isabs(name) and ".." not in Path(name).parts and (folder / name).is_file():
            yield folder / name


def others(folder: Path) -> list[str]:
    """List the sorted names in a folder, without fdl's bookkeeping and the files that receive this process's output."""
    if not folder.is_dir():
        return []
    kept = {
        LOCK,
        MARK,
        REPLACED,
        _MOVING,
        COMPARE,
    }  # the comparison of a recipe lies next to its run, which leaves it alone
    found = [path for path in folder.iterdir() if path.name not in kept and not path.name.startswith(".nfs")]
    return sorted(path.name + ("/" if path.is_dir() else "") for path in found if not _is_output(path))


def names(found: list[str]) -> str:
    """Join file names for a message, the first few if there are many."""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"


def mark(folder: Path, kind: str, **more: Any) -> None:
    """Mark a folder as created by fdl.

    Args:
        folder: an existing folder.
        kind: its purpose: ``"run"`` or ``"comparison"``.
        more: further entries of the mark, JSON values.
    """
    from fdl import __version__

    text = json.dumps({"kind": kind, "fdl": __version__, **more}, indent=1)
    write_atomically(folder / MARK, f"{text}\n".encode())


def read_mark(folder: Path) -> dict[str, Any]:
    """Read the entries that `mark` wrote; empty if there is no mark."""
    try:
        found = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note_export(run: Path, output: Path) -> None:
    """Record the files of an export into a run's folder, so that a new run there replaces them, too.

    Args:
        run: the run's folder.
        output: the export's folder; nothing is recorded if it is not within the run's.
    """
    place, base = output.resolve(), run.resolve()
    if base not in place.parents:
        return
    noted = read_mark(run)
    files = [str(path.relative_to(base)) for path in sorted(place.rglob("*")) if path.is_file()]
    exports = sorted({*noted.get("exports", []), *files})
    mark(run, "run", exports=exports)


def is_run(folder: Path) -> bool:
    """Return True if a folder holds a run, finished or not, by its mark or by files that nothing else writes."""
    if read_mark(folder).get("kind") == "run":
        return True
    if not (folder / RECIPE).is_file():
        return False
    return last_round(folder) is not None or _is_summary(folder / SUMMARY)


def checkpoints(place: Path) -> dict[Path, int]:
    """List the files in a folder of checkpoints with their rounds, newest first."""
    try:
        found = list(place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    rounds = {path: int(match[1]) for path in found if (match := CHECKPOINT.fullmatch(path.name))}
    return dict(sorted(rounds.items(), key=lambda item: (item[1], item[0].name), reverse=True))


def last_round(folder: Path) -> int | None:
    """Return the newest round saved in a run's folder, 0 for the state before the first; None if nothing is saved."""
    return next(iter(checkpoints(folder / CHECKPOINTS).values()), None)


def move_aside(folder: Path) -> None:
    """Move the files of an earlier run, if there are any, into `REPLACED`."""
    if not (found := list(own_files(folder))):
        return
    for path in found:
        _move(path, folder / _MOVING / path.relative_to(folder))
    if (folder / MARK).is_file():
        _move(folder / MARK, folder / _MOVING / MARK)
    os.rename(folder / _MOVING, folder / REPLACED)
    _remove_empty(folder, found)


def put_back(folder: Path) -> None:
    """Undo `move_aside`: delete the new run's files and restore the earlier run's, if there are any.

    Args:
        folder: the run's folder.

    Raises:
        UserError: a file cannot be moved; the files that were moved aside are kept.
    """
    moving = folder / _MOVING
    try:
        if (folder / REPLACED).is_dir():
            found = list(own_files(folder))
            for path in found:
                path.unlink()
            _remove_empty(folder, found)
            os.rename(folder / REPLACED, moving)
        if not moving.is_dir():
            return
        for path in sorted(path for path in moving.rglob("*") if not path.is_dir() or path.is_symlink()):
            _move(path, folder / path.relative_to(moving))
        shutil.rmtree(moving)
    except OSError as error:
        raise UserError(f"{error.filename or moving}: cannot be moved: {error.strerror}") from error


def drop_replaced(folder: Path) -> None:
    """Delete the files that `move_aside` moved, once a new run has replaced them."""
    if (folder / REPLACED).is_dir():
        shutil.rmtree(folder / REPLACED)


def needs_recovery(folder: Path) -> bool:
    """Return True if a process was killed while it replaced an earlier run."""
    return (folder / REPLACED).is_dir() or (folder / _MOVING).is_dir()


def recover(folder: Path) -> None:
    """Recover from a killed process: keep the new run if it has finished a round, else restore the earlier one."""
    if (folder / REPLACED).is_dir() and last_round(folder):
        drop_replaced(folder)
    else:
        put_back(folder)


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)


def renamed_aside(path: Path) -> Path | None:
    """Rename an existing file or folder to a numbered name, so that a new one can have its name.

    Args:
        path: e.g. ``audit.json``.

    Returns:
        The new path, e.g. ``audit-1.json``; None if there was no such file.
    """
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    os.rename(path, target)
    return target


def _remove_empty(folder: Path, paths: list[Path]) -> None:
    """Remove the empty folders among those that held some files of a run."""
    places = {place for path in paths for place in path.parents if folder in place.parents}
    for place in sorted(places, key=lambda place: len(place.parts), reverse=True):
        with suppress(OSError):
            place.rmdir()


def _is_summary(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"method", "seed", "history", "communication"} <= set(found)


def _is_output(path: Path) -> bool:
    """Return True if a file receives this process's output, as with ``> run/log.txt`` or Slurm's ``--output``."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError, AttributeError):
            if stream is not None and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return True
    return False
