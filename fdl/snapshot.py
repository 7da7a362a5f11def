"""All that a run must remember: taken from the loop after a round, put back before it goes on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fdl import checkpoint
from fdl.errors import UserError
from fdl.modules.weights import load_into, state_of
from fdl.report import best_round
from fdl.tasks import TASKS

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop

BEST = "best.safetensors"
"""The student of the round that was best on validation data, in the run's folder."""

log = logging.getLogger("fdl")


def save(loop: FederatedLoop) -> None:
    """Write a checkpoint of the loop as it is between two rounds; of several ranks, the first one writes it."""
    student = loop.server.student
    with loop.seconds("checkpoint"):
        owned = loop.spread.all_states()
        weights = None if student is None else state_of(student)
        if loop.store is not None:
            loop.store.settle()
        if not loop.runtime.ranks.leader:
            return
        # before the checkpoint: a run killed in between does this round again and writes the same student
        if student is not None and loop.history and best_round(loop.history, TASKS[loop.server.task]) == loop.round:
            beside = loop.method.beside_student(loop.server)
            checkpoint.save_best(loop.folder / BEST, loop.round, weights, beside)
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
        path = checkpoint.save(loop.folder / "checkpoints", loop.round, state, loop.recipe.checkpoint.keep)
        if loop.store is not None:
            loop.store.hold(checkpoint.files(path.parent))
    loop.callbacks.on_checkpoint(loop, path)


def restore(loop: FederatedLoop) -> None:
    """Put the newest good checkpoint back into a freshly built loop.

    Raises:
        UserError: when there is none, or when the data are not those it was written with.
    """
    state, path, damaged = checkpoint.load(loop.folder / "checkpoints")
    for sentence in damaged:
        log.warning("%s", sentence)
    if state["fingerprint"] != loop.fingerprint:
        raise UserError(f"{path}: the data, or who holds which of them, changed since this checkpoint was written")
    loop.round = loop.resumed_from = state["round"]
    loop.history, loop.stopped = state["history"], state["stopped"]
    loop.seconds.update(state["seconds"])
    loop.seconds.parts.update(state.get("parts", {}))
    if loop.server.student is not None:
        load_into(loop.server.student, state["student"])
    loop.server.state = state["server"]
    loop.method.restored(loop.server)
    if loop.store is not None and loop.runtime.ranks.leader:
        loop.store.hold(checkpoint.files(path.parent), sweep=True)
    loop.runtime.ranks.any(False)  # nobody writes before this is done
    loop.spread.restore(state)
    loop.ledger.load_state_dict(state["ledger"])
    loop.callbacks.load_state_dict(state["callbacks"])
    log.info("resuming after round %d of %d from %s", loop.round, loop.rounds, path)
