"""Snapshots of a run: saved to a checkpoint after a round, restored before it resumes."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from fdl.errors import UserError
from fdl.federation.history import best_round
from fdl.metrics.tasks import TASKS
from fdl.state import checkpoint
from fdl.state.run_folder import INPUTS, RECIPE, SUMMARY, TOKENIZER, last_round, names, own_files
from fdl.state.weights import load_into, module_state

if TYPE_CHECKING:
    from pathlib import Path

    from fdl.federation.state import Federation

BEST = "best.safetensors"
"""The student of the round that was best on validation data, in the run's folder."""

BEFORE = "best-before.safetensors"
"""The best student at the last checkpoint, if a better one has been found since."""

log = logging.getLogger("fdl")


def require_vacant(folder: Path) -> None:
    """Raise if a new run would mix its files with those of another.

    Args:
        folder: the run's folder.

    Raises:
        UserError: the folder holds files of another run.
    """
    own = {folder / RECIPE, folder / INPUTS}  # written before the first round
    found = [path for path in own_files(folder) if path not in own and path.parent != folder / TOKENIZER]
    # a process that was killed before its first checkpoint leaves half a file, or a log without a round
    found = [path for path in found if path.suffix != ".partial" and not _is_header(path)]
    # a run that failed in its first round has no results worth keeping
    if found and not (last_round(folder) == 0 and not (folder / SUMMARY).exists()):
        shown = names([str(path.relative_to(folder)) for path in found])
        raise UserError(f"{folder}: holds files of a run: {shown}; take another folder, or `fdl.fit` to replace it")


def _is_header(path: Path) -> bool:
    """Return True if a file is a table of metrics without a row."""
    return path.suffix == ".csv" and path.read_bytes().count(b"\n") <= 1


def save_best(loop: Federation) -> None:
    """Save the student of the round that has just ended, if it is the best so far on validation data.

    The file that this replaces is kept next to it until the next checkpoint: a run that is killed before that resumes
    from a round at which the earlier student was the best.

    Args:
        loop: the run after a round.
    """
    student = loop.server.student
    best = student is not None and best_round(loop.history, TASKS[loop.server.task]) == loop.round > 0
    if not loop.runtime.ranks.any(best):
        return
    with loop.seconds("checkpoint"):
        weights = module_state(student)
        if loop.runtime.ranks.leader:
            path, before = loop.folder / BEST, loop.folder / BEFORE
            if path.exists() and not before.exists():
                os.replace(path, before)
            checkpoint.write_best(path, loop.round, weights, loop.method.student_extra_state(loop.server))


def save(loop: Federation) -> None:
    """Write a checkpoint of a run between two rounds; all ranks call this, and the leader writes it.

    Args:
        loop: the run.
    """
    student = loop.server.student
    save_best(loop)  # first: a run killed in between does this round again and writes the same student
    with loop.seconds("checkpoint"):
        owned = loop.placement.gather_states()
        weights = None if student is None else module_state(student)
        if loop.store is not None:
            loop.store.mark_checkpointed()
        if not loop.runtime.ranks.leader:
            return
        state = {
            "round": loop.round,
            "fingerprint": loop.fingerprint,
            "history": loop.history,
            "seconds": loop.seconds,
            "parts": loop.seconds.parts,
            "stopped": loop.stopped,
            "student": weights,
            "server": loop.server.state,
            "ledger": loop.ledger.state_dict(),
            **owned,
            "callbacks": loop.callbacks.state_dict(),
        }
        path = checkpoint.write_round(loop.folder / "checkpoints", loop.round, state, loop.recipe.checkpoint.keep)
        (loop.folder / BEFORE).unlink(missing_ok=True)
        if loop.store is not None:
            loop.store.retain(checkpoint.files(path.parent))
    loop.callbacks.on_checkpoint(loop, path)


def restore(loop: Federation, write: bool = True) -> None:
    """Restore the newest valid checkpoint into a freshly built loop.

    Args:
        loop: a freshly built loop.
        write: True if the run resumes, so that files of a killed process are cleaned up; False if it is only inspected.

    Raises:
        UserError: there is no valid checkpoint, or it was written with other data.
    """
    state, path, damaged = checkpoint.load_newest(loop.folder / "checkpoints")
    for sentence in damaged:
        log.warning("%s", sentence)
    if state["fingerprint"] != loop.fingerprint:
        raise UserError(
            f"{path}: the data, or who holds which of them, changed since this checkpoint was written; a run goes on "
            "with the same data only, wherever they lie"
        )
    loop.round = loop.resumed_from = state["round"]
    loop.history, loop.stopped = state["history"], state["stopped"]
    loop.seconds.update(state["seconds"])
    loop.seconds.parts.update(state.get("parts", {}))
    if loop.server.student is not None:
        load_into(loop.server.student, state["student"])
    loop.server.state = state["server"]
    loop.method.on_restore(loop.server)
    if loop.store is not None and loop.runtime.ranks.leader:
        loop.store.retain(checkpoint.files(path.parent), sweep=write)
    if loop.runtime.ranks.leader and write:
        _restore_best(loop)
    loop.runtime.ranks.any(False)  # a barrier: no rank writes before this is done
    loop.placement.restore(state)
    loop.ledger.load_state_dict(state["ledger"])
    loop.callbacks.load_state_dict(state["callbacks"])
    log.info("resuming after round %d of %d from %s", loop.round, loop.rounds, path)


def _restore_best(loop: Federation) -> None:
    """Restore `BEST` to the student of the round that was the best at this checkpoint.

    A killed run may have found and saved a better one since; the resumed run will find it again.
    """
    number = best_round(loop.history, TASKS[loop.server.task])
    if loop.server.student is None or number is None:
        return
    path, before = loop.folder / BEST, loop.folder / BEFORE
    if checkpoint.round_of(path) != number and checkpoint.round_of(before) == number:
        os.replace(before, path)
    before.unlink(missing_ok=True)
    if (found := checkpoint.round_of(path)) != number:
        there = "is not there" if found is None else f"is that of round {found}"
        log.warning("%s: the student of round %d, the best so far, is lost: the file %s", path, number, there)
