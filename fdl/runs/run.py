"""Execution of a recipe in a run's folder, and protection of an earlier run there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fdl.callbacks.base import Callback
from fdl.engine.distributed.launch_environment import is_follower, started_by_others
from fdl.errors import UserError
from fdl.recipe.config import Recipe
from fdl.recipe.validate import fill
from fdl.runs.run_keys import EVALUATION_KEYS, RESUMABLE_KEYS, changes, format_differences, is_within, location_keys
from fdl.state import run_folder
from fdl.state.run_folder import CHECKPOINTS, RECIPE, SUMMARY
from fdl.utils.files import write_atomically
from fdl.utils.interrupts import GracefulShutdown, Interrupted
from fdl.utils.locks import FolderLock, is_locked, require_unlocked
from fdl.utils.paths import expanded

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop

__all__ = [
    "CHECKPOINTS",
    "RECIPE",
    "RESUMABLE_KEYS",
    "SUMMARY",
    "changes",
    "check_can_run",
    "has_checkpoint",
    "is_complete",
    "run_recipe",
]


_NO_RECIPE = "holds checkpoints of a run without its recipe"


def run_recipe(recipe: Recipe, folder: str | Path, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run a recipe in a folder, or resume the run in it.

    Args:
        recipe: the checked recipe.
        folder: the run's folder: absent, empty, or, with one of the next two arguments, the folder of a run.
        resume: continue from the last valid checkpoint. A complete run is not repeated.
        overwrite: replace a run in the folder. Its files are kept until the new run has saved its first round, and
            restored if it fails before; files that fdl did not write are never touched.

    Returns:
        The summary, also in ``summary.json``.

    Raises:
        UserError: the folder holds other files, another process uses it, or there is nothing to resume.
        Interrupted: after Ctrl-C, a subclass of KeyboardInterrupt; completed rounds are saved.
    """
    folder = expanded(folder)
    if resume and overwrite:
        raise UserError("resume goes on with the run that is there, overwrite begins it anew: give one of them")
    if is_follower():
        # if only this process failed here, the others would wait forever, so it checks only what all processes see
        if started_by_others() and not is_locked(folder):
            check_can_run(recipe, folder, resume, overwrite)
        with GracefulShutdown(at_once=True):
            return _run(recipe, folder, resume)
    if not run_folder.needs_recovery(folder):
        require_unlocked(folder)
        check_can_run(recipe, folder, resume, overwrite)
        if resume and is_complete(recipe, folder):
            return read_summary(folder)
    with GracefulShutdown(at_once=True), FolderLock(folder):
        run_folder.recover(folder)
        check_can_run(recipe, folder, resume, overwrite)  # again: under the lock no other process changes the folder
        if resume and is_complete(recipe, folder):
            return read_summary(folder)
        return _run(recipe, folder, resume)


def _run(recipe: Recipe, folder: Path, resume: bool) -> dict[str, Any]:
    """Build the federation and run it; with several processes, only the leading one writes."""
    from fdl.build.federation import build_federation
    from fdl.engine.distributed.launcher import processes
    from fdl.runs import inputs

    with processes(recipe, folder, resume):
        loop = build_federation(recipe, folder)
        if is_follower():
            return loop.run(resume=resume)
        writer = _RunWriter(recipe, folder, resume)
        loop.callbacks.callbacks.insert(0, writer)  # first, so that failing callbacks cannot prevent its writes
        loop.on_summary = writer.write
        with writer.own_folder():
            inputs.write_input_spec(loop)
            summary = loop.run(resume=resume)
            writer.write(summary)  # again: callbacks may have extended it
    return summary


class _RunWriter(Callback):
    """Writes the recipe and the summary of a run, and keeps an earlier run until this one has saved a round."""

    def __init__(self, recipe: Recipe, folder: Path, resume: bool):
        self.recipe, self.folder, self.resume = recipe, folder, resume
        self.saved = resume
        self._replaces = False

    @contextmanager
    def own_folder(self) -> Iterator[None]:
        """Use the folder for this run within the context; an earlier run is restored if this one saves no round."""
        try:
            if not self.resume:
                self._begin()
            yield
        except BaseException as error:
            if not self.saved:
                run_folder.put_back(self.folder)
            if isinstance(error, KeyboardInterrupt):
                number = getattr(error, "number", Interrupted().number)
                saved = self.saved or (not self._replaces and has_checkpoint(self.folder))
                raise Interrupted(number, saved) from error
            raise

    def _begin(self) -> None:
        try:
            run_folder.move_aside(self.folder)
        except OSError as error:
            raise UserError(f"{error.filename or self.folder}: cannot be moved: {error.strerror}") from error
        self._replaces = run_folder.needs_recovery(self.folder)
        run_folder.mark(self.folder, "run")
        write_recipe(self.recipe, self.folder)

    def on_checkpoint(self, loop: FederatedLoop, path: Path) -> None:
        """Delete the replaced run once the first round is saved."""
        if self.resume:
            (self.folder / SUMMARY).unlink(missing_ok=True)
            write_recipe(self.recipe, self.folder)
        elif loop.round > 0 and not self.saved:
            run_folder.drop_replaced(self.folder)
            self.saved = True

    def write(self, summary: Mapping[str, Any]) -> None:
        """Write the summary; called before attacks and callbacks, which may fail."""
        from fdl.runs.report import write_summary

        write_recipe(self.recipe, self.folder)
        write_summary(self.folder / SUMMARY, summary)


def folder_of(recipe: Recipe, given: str | Path | None = None) -> Path:
    """Return the folder of a recipe's run.

    Args:
        recipe: the recipe, with `output_dir` and `name`.
        given: a folder that replaces ``<output_dir>/<name>``; None for the default.

    Raises:
        UserError: the folder or `output_dir` names a variable that is not set.
    """
    if given is not None:
        return expanded(given)
    try:
        return expanded(recipe.output_dir) / recipe.name
    except UserError as error:
        raise UserError(f"output_dir: {error}") from error


def rejection_reason(recipe: Recipe, folder: Path) -> str:
    """Return the error message with which `run_recipe` would reject a recipe in a folder now; empty if it would run.

    Args:
        recipe: the checked recipe.
        folder: the run's folder.
    """
    try:
        require_unlocked(folder)
        check_can_run(recipe, folder)
    except UserError as error:
        return str(error)
    return ""


def check_can_run(recipe: Recipe, folder: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a recipe may run in a folder.

    Args:
        recipe: the checked recipe.
        folder: the run's folder.
        resume: continue the run in the folder.
        overwrite: replace the run in the folder.

    Raises:
        UserError: the folder cannot be used, or holds files of no run, a run that would be lost, or, with `resume`,
            no run that can be resumed; the message names the alternatives.
    """
    require_usable(folder)
    if resume:
        _refuse_to_resume(recipe, folder)
    elif run_folder.is_run(folder):
        if not overwrite:
            _refuse_to_replace(recipe, folder)
    elif has_checkpoint(folder):
        raise UserError(f"{folder}: {_NO_RECIPE}; choose another --output-dir")
    elif found := run_folder.others(folder):
        raise UserError(
            f"{folder}: is no empty folder, and holds no run of fdl, but {run_folder.names(found)}; choose another "
            "folder with --output-dir"
        )


def _refuse_to_resume(recipe: Recipe, folder: Path) -> None:
    now, stored = recipe.to_dict(), _stored_recipe(folder) if run_folder.is_run(folder) else None
    if stored is None or not (has_checkpoint(folder) or is_complete(recipe, folder)):
        raise UserError(f"{folder}: there is no checkpoint to resume from; start the run without --resume")
    changed = changes(stored, now)
    allowed = [*location_keys(stored, now, changed), *_increased_rounds(stored, recipe, changed)]
    measured = [key for key in changed if is_within(key, EVALUATION_KEYS)]
    if blocking := [key for key in changed if key not in allowed and key not in measured]:
        raise UserError(
            f"{folder}: cannot resume, the recipe has changed since the run began:\n"
            f"{format_differences(stored, now, blocking)}\n"
            "Undo this, or start a new run with another --output-dir. What may change: more federation.rounds, "
            f"where the data lie, {', '.join((*RESUMABLE_KEYS, *EVALUATION_KEYS))}"
        )
    if measured and (folder / SUMMARY).exists() and not _increased_rounds(stored, recipe, changed):
        raise UserError(
            f"{folder}: holds a finished run, and there is no round to come that these could measure:\n"
            f"{format_differences(stored, now, measured)}\n"
            "Ask for more federation.rounds too, or undo this; for attacks, use fdl audit"
        )


def _refuse_to_replace(recipe: Recipe, folder: Path) -> None:
    now, stored = recipe.to_dict(), _stored_recipe(folder)
    finished, saved = (folder / SUMMARY).exists(), run_folder.last_round(folder)
    replace = "take its place with --overwrite"
    if stored is None:
        if finished or saved is not None:
            raise UserError(f"{folder}: {_NO_RECIPE}; choose another --output-dir, or {replace}")
        return
    changed = changes(stored, now)
    if changed and (finished or saved):
        hint = (
            "; --resume goes on with it to more rounds" if changed == _increased_rounds(stored, recipe, changed) else ""
        )
        raise UserError(
            f"{folder}: holds a{' finished' if finished else 'n unfinished'} run of another recipe, which differs in:\n"
            f"{format_differences(stored, now, changed)}\n"
            f"Choose another folder with --output-dir, or another name with name=…, or {replace}{hint}"
        )
    if finished and not changed:
        raise UserError(
            f"{folder}: holds a finished run of this recipe; choose another --output-dir, go on with it to more "
            f"rounds with --resume federation.rounds=…, or {replace}"
        )
    if saved is not None and not changed:
        raise UserError(
            f"{folder}: holds an unfinished run of this recipe; go on with it with --resume, "
            f"choose another --output-dir, or {replace}"
        )


def require_usable(folder: Path) -> None:
    """Check that a folder can be created or written to, without writing anything.

    Args:
        folder: the folder.

    Raises:
        UserError: it is a file, its name is too long, or the user has no permission to write there.
    """
    try:
        if any(len(os.fsencode(part)) > 255 for part in folder.parts):
            raise OSError(None, "File name too long")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file, expected a folder for the run")
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        if not there.is_dir():
            raise OSError(None, "Not a directory")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OSError(None, f"{there} is read-only, or somebody else's")
    except OSError as error:
        raise UserError(f"{_brief(folder)}: cannot be written: {error.strerror}") from error


def is_complete(recipe: Recipe, folder: Path) -> bool:
    """Check if a folder holds a finished run of exactly this experiment, with the requested attacks.

    Args:
        recipe: the checked recipe.
        folder: the run's folder.
    """
    if not (run_folder.is_run(folder) and (folder / SUMMARY).is_file()):
        return False
    stored = _stored_recipe(folder)
    if stored is None or changes(stored, recipe.to_dict()):
        return False
    return not recipe.evaluation.attacks or read_summary(folder).get("audit") is not None


def has_checkpoint(folder: Path) -> bool:
    """Check if a round of a run was saved in a folder, even if its files were damaged since.

    Args:
        folder: the run's folder.
    """
    return run_folder.last_round(folder) is not None


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary of a finished run.

    Args:
        folder: the run's folder.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SUMMARY}: cannot be read: {error}; delete it to run again") from error


def require_finished(folder: Path) -> None:
    """Check that a folder holds a finished run.

    Args:
        folder: the run's folder.

    Raises:
        UserError: it holds none.
    """
    if not (folder / RECIPE).is_file() or not (folder / SUMMARY).is_file():
        raise UserError(f"{_brief(folder)}: holds no finished run (no {RECIPE} and {SUMMARY})")


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Store a recipe in its run's folder.

    Args:
        recipe: the recipe.
        folder: the run's folder.
    """
    write_atomically(folder / RECIPE, recipe.to_yaml().encode())


def _stored_recipe(folder: Path) -> dict[str, Any] | None:
    """Read the recipe of the run in a folder; None without one."""
    path = folder / RECIPE
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path))  # unlike yaml.safe_load it reads 1e-05 as a number
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}; choose another --output-dir") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: is not the recipe of a run; choose another --output-dir")
    return fill(stored, Recipe)  # keys that were added after the run have their defaults


def _increased_rounds(stored: Mapping[str, Any], recipe: Recipe, changed: list[str]) -> list[str]:
    """Return the key of the number of rounds if it was increased."""
    federation = stored.get("federation")
    rounds = federation.get("rounds") if isinstance(federation, Mapping) else None
    more = isinstance(rounds, int) and rounds < recipe.federation.rounds
    return [key for key in changed if key == "federation.rounds" and more]


def _brief(folder: Path) -> str:
    text = str(folder)
    return text if len(text) <= 200 else f"{text[:200]}…"
