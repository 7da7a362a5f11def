"""A run's folder: whether a recipe may run there, what is kept of an earlier run, and when a run is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fdl.callbacks.base import Callback
from fdl.clusters import is_follower, started_by_others
from fdl.errors import UserError
from fdl.recipe import Recipe, difference
from fdl.schema import fill

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop

RECIPE, SUMMARY, CHECKPOINTS = "recipe.yaml", "summary.json", "checkpoints"
_WRITTEN = (
    RECIPE,
    SUMMARY,
    "audit.json",
    "metrics.csv",
    "best.safetensors",
    "inputs.json",
    "tokenizer",
    CHECKPOINTS,
    "clients",
    "profile.txt",
    "tensorboard",
    ".*.partial",
)

# A run may go on with other values here: they change where and how it is watched and computed, not what it computes.
FREE = (
    "output",
    "callbacks",
    "checkpoint",
    "compare",
    "executor",
    "inference",
    "profile",
    "federation.state",
    "fabric.accelerator",
    "fabric.devices",
    "fabric.num_nodes",
    "fabric.strategy",
    "fabric.timeout",
)


def fit(recipe: Recipe, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Run a recipe in a folder, or go on with the run that is there.

    Args:
        recipe: the checked recipe.
        folder: where the run's files go.
        resume: go on from the last good checkpoint. A run that is complete is not run again.

    Returns:
        The summary, also in ``summary.json``.

    Raises:
        UserError: when the folder holds something else, or there is nothing to resume.
        KeyboardInterrupt: after Ctrl-C; what was done is saved.
    """
    leader = not is_follower()
    if leader or started_by_others():  # a process that ended here alone would leave the others waiting
        refuse(recipe, folder, resume)
    if resume and is_complete(recipe, folder):
        return read_summary(folder)
    from fdl import inputs
    from fdl.build import build
    from fdl.launcher import processes
    from fdl.report import write_summary

    with processes(recipe, folder, resume):
        loop = build(recipe, folder)
        if leader and resume:
            loop.callbacks.append(_Supersede(recipe, folder))
        elif leader:
            _begin(recipe, folder)
        if leader:
            inputs.keep(loop)
        summary = loop.run(resume=resume)
        if leader:
            _note(recipe, folder)
            write_summary(folder / SUMMARY, summary)
    return summary


class _Supersede(Callback):
    """Keeps the earlier run's recipe and summary until the resumed run has saved a round of its own."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder

    def on_checkpoint(self, loop: FederatedLoop, path: Path) -> None:
        """From here on the folder is the resumed run's."""
        (self.folder / SUMMARY).unlink(missing_ok=True)
        _note(self.recipe, self.folder)


def refuse(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Raise when a recipe must not run in a folder, saying what can be done.

    Raises:
        UserError: the folder cannot be used, holds a run of another recipe or an unfinished run of this one; or, with
            `resume`, there is no run to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder for the run")
    stored = _stored(folder)
    saved = has_checkpoint(folder)
    changed = changes(stored, recipe.to_dict()) if stored is not None else []
    grown = [key for key in changed if key == "federation.rounds" and _rounds(stored) < recipe.federation.rounds]
    if resume:
        if stored is None or not (saved or is_complete(recipe, folder)):
            raise UserError(f"{folder}: there is no checkpoint to resume from; start the run without --resume")
        if blocking := [key for key in changed if key not in grown]:
            raise UserError(
                f"{folder}: cannot resume, the recipe has changed since the run began:\n"
                f"{_changed_lines(stored, recipe, blocking)}\n"
                "Undo this, or start a new run with another --output-dir. "
                f"What may change: more federation.rounds, {', '.join(FREE)}"
            )
        return
    if stored is None and saved:
        raise UserError(f"{folder}: holds checkpoints of a run without its recipe; choose another --output-dir")
    if changed:
        hint = "; --resume goes on with it to more rounds" if changed == grown and saved else ""
        raise UserError(
            f"{folder}: holds a run of another recipe, which differs in:\n"
            f"{_changed_lines(stored, recipe, changed)}\n"
            f"Choose another folder with --output-dir, or another name with name=…, or delete the folder{hint}"
        )
    if saved and not (folder / SUMMARY).exists():
        raise UserError(
            f"{folder}: holds an unfinished run of this recipe; go on with it with --resume, "
            "choose another --output-dir, or delete the folder"
        )


def changes(stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Keys that make two recipes different experiments."""
    return [key for key in difference(stored, recipe) if not any(f"{key}.".startswith(f"{free}.") for free in FREE)]


def is_complete(recipe: Recipe, folder: Path) -> bool:
    """Whether the folder holds a finished run of exactly this experiment."""
    stored = _stored(folder)
    return stored is not None and (folder / SUMMARY).is_file() and not changes(stored, recipe.to_dict())


def has_checkpoint(folder: Path) -> bool:
    """Whether a run was saved here, whatever became of the files since."""
    return any((folder / CHECKPOINTS).glob("*.safetensors"))


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        UserError: when the file was damaged.
    """
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SUMMARY}: cannot be read: {error}; delete it to run again") from error


def _begin(recipe: Recipe, folder: Path) -> None:
    """Clear away an earlier run of the same recipe, and note the recipe."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _WRITTEN:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error
    _note(recipe, folder)


def _note(recipe: Recipe, folder: Path) -> None:
    """Store the recipe with the run."""
    from fdl.checkpoint import write_atomically

    write_atomically(folder / RECIPE, recipe.to_yaml().encode())


def _stored(folder: Path) -> dict[str, Any] | None:
    """The recipe of the run in a folder."""
    path = folder / RECIPE
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path))  # unlike yaml.safe_load it reads 1e-05 as a number
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}; choose another --output-dir") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: is not the recipe of a run; choose another --output-dir")
    return fill(stored, Recipe)  # a key that the run's version did not know yet had its default


def _rounds(stored: Mapping[str, Any]) -> float:
    federation = stored.get("federation")
    rounds = federation.get("rounds") if isinstance(federation, Mapping) else None
    return rounds if isinstance(rounds, int) else float("inf")


def _changed_lines(stored: Mapping[str, Any], recipe: Recipe, keys: list[str]) -> str:
    lines = [f"  - {key}: {_at(stored, key)} there, {_at(recipe.to_dict(), key)} here" for key in keys[:10]]
    return "\n".join(lines + ([f"  - and {len(keys) - 10} more"] if len(keys) > 10 else []))


def _at(tree: Any, key: str) -> str:
    for part in key.split("."):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return "absent"
    return "null" if tree is None else repr(tree)
