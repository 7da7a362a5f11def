"""What lies in a run's folder: which files fdl wrote, and how a new run takes their place. Nothing imports torch."""

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
"""What the run's models take, and the folder of a tokenizer that has no name of its own."""

MARK = ".fdl.json"
"""The file that says that fdl made a folder, and what for."""

REPLACED = ".replaced"
"""Where an earlier run's files are kept until the run that takes their place has finished a round and saved it."""

CHECKPOINT = re.compile(r"round-(\d{6,})-[0-9a-f]{16}\.safetensors")
"""The name of a checkpoint."""

CLIENT = re.compile(r"client-\d{6,}-[0-9a-f]{16}\.safetensors")
"""The name of a file of a client's state."""

_MOVING = ".replacing"
"""The same while files are moved there or back: whatever lies in it belongs into the folder."""

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
"""What a run writes, by the folder in the run's own."""

_NAMED = 8


def own_files(folder: Path) -> Iterator[Path]:
    """The files in a run's folder that fdl wrote, exports among them; all others are somebody else's."""
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
    """Names in a folder, sorted, of what is neither fdl's bookkeeping nor a file that this process's output goes to."""
    if not folder.is_dir():
        return []
    kept = {
        LOCK,
        MARK,
        REPLACED,
        _MOVING,
        COMPARE,
    }  # the comparison of a recipe lies beside its run, which leaves it alone
    found = [path for path in folder.iterdir() if path.name not in kept and not path.name.startswith(".nfs")]
    return sorted(path.name + ("/" if path.is_dir() else "") for path in found if not _is_output(path))


def names(found: list[str]) -> str:
    """File names for a message, not all of them where there are many."""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"


def mark(folder: Path, kind: str, **more: Any) -> None:
    """Note that fdl made a folder.

    Args:
        folder: there already.
        kind: what for: ``"run"`` or ``"comparison"``.
        more: what else to note.
    """
    from fdl import __version__

    text = json.dumps({"kind": kind, "fdl": __version__, **more}, indent=1)
    write_atomically(folder / MARK, f"{text}\n".encode())


def read_mark(folder: Path) -> dict[str, Any]:
    """What `mark` noted; empty where there is no mark."""
    try:
        found = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note_export(run: Path, output: Path) -> None:
    """Note the files of an export that lies in a run's folder, so that a new run there does not leave it behind."""
    place, base = output.resolve(), run.resolve()
    if base not in place.parents:
        return
    noted = read_mark(run)
    files = [str(path.relative_to(base)) for path in sorted(place.rglob("*")) if path.is_file()]
    exports = sorted({*noted.get("exports", []), *files})
    mark(run, "run", exports=exports)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of fdl's, finished or not: by its mark, or by files that nothing else writes."""
    if read_mark(folder).get("kind") == "run":
        return True
    if not (folder / RECIPE).is_file():
        return False
    return last_round(folder) is not None or _is_summary(folder / SUMMARY)


def checkpoints(place: Path) -> dict[Path, int]:
    """The checkpoints in a folder of checkpoints, each with its round, the newest first."""
    try:
        found = list(place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    rounds = {path: int(match[1]) for path in found if (match := CHECKPOINT.fullmatch(path.name))}
    return dict(sorted(rounds.items(), key=lambda item: (item[1], item[0].name), reverse=True))


def last_round(folder: Path) -> int | None:
    """The newest round that is saved in a run's folder, 0 for the state before the first; None where nothing is."""
    return next(iter(checkpoints(folder / CHECKPOINTS).values()), None)


def move_aside(folder: Path) -> None:
    """Move what an earlier run wrote into `REPLACED`; nothing where there is none."""
    if not (found := list(own_files(folder))):
        return
    for path in found:
        _move(path, folder / _MOVING / path.relative_to(folder))
    if (folder / MARK).is_file():
        _move(folder / MARK, folder / _MOVING / MARK)
    os.rename(folder / _MOVING, folder / REPLACED)
    _remove_empty(folder, found)


def put_back(folder: Path) -> None:
    """Bring back what `move_aside` took away, in the place of whatever the new run wrote; nothing where there is none.

    Raises:
        UserError: a file cannot be moved; what was moved aside is still there.
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
    """Remove what `move_aside` took away: a new run has taken its place."""
    if (folder / REPLACED).is_dir():
        shutil.rmtree(folder / REPLACED)


def needs_recovery(folder: Path) -> bool:
    """Whether a process was killed while it took the place of an earlier run."""
    return (folder / REPLACED).is_dir() or (folder / _MOVING).is_dir()


def recover(folder: Path) -> None:
    """Settle what a process that was killed left: the new run where it has finished a round, the earlier one else."""
    if (folder / REPLACED).is_dir() and last_round(folder):
        drop_replaced(folder)
    else:
        put_back(folder)


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)


def renamed_aside(path: Path) -> Path | None:
    """Give a file or folder another name, so that a new one can take its own.

    Args:
        path: e.g. ``audit.json``.

    Returns:
        Where it is now, e.g. ``audit-1.json``; None where there was none.
    """
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    os.rename(path, target)
    return target


def _remove_empty(folder: Path, paths: list[Path]) -> None:
    """Remove the folders that held some files of a run, where nothing is left in them."""
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
    """Whether this process writes its own output there, as with ``> run/log.txt`` or Slurm's ``--output``."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError, AttributeError):
            if stream is not None and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return True
    return False
