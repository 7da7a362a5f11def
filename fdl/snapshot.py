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
    """Write a checkpoint of the loop as it is between two rounds."""
    student = loop.server.student
    with loop.seconds("checkpoint"):
        # before the checkpoint: a run killed in between does this round again and writes the same student
        if student is not None and loop.history and best_round(loop.history, TASKS[loop.server.task]) == loop.round:
            beside = loop.method.beside_student(loop.server)
            checkpoint.save_best(loop.folder / BEST, loop.round, state_of(student), beside)
        state = {
            "round": loop.round,
            "fingerprint": loop.fingerprint,
            "history": loop.history,
            "seconds": loop.seconds,
            "stopped": loop.stopped,
            "student": None if student is None else state_of(student),
            "server": loop.server.state,
            "clients": {str(client.id): client.state for client in loop.clients if client.state},
            "ledger": loop.ledger.state_dict(),
            "channel": loop.channel.state_dict(),
            "callbacks": loop.callbacks.state_dict(),
        }
        path = checkpoint.save(loop.folder / "checkpoints", loop.round, state, loop.recipe.checkpoint.keep)
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
    if loop.server.student is not None:
        load_into(loop.server.student, state["student"])
    loop.server.state = state["server"]
    loop.method.restored(loop.server)
    for client in loop.clients:
        client.state = state["clients"].get(str(client.id), {})
    loop.ledger.load_state_dict(state["ledger"])
    loop.channel.load_state_dict(state["channel"])
    loop.callbacks.load_state_dict(state["callbacks"])
    log.info("resuming after round %d of %d from %s", loop.round, loop.rounds, path)
