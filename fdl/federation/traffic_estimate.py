"""Traffic of a round, measured by a dry run before anything is trained."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from fdl.errors import RejectedMessageError
from fdl.participants import copy_of
from fdl.state.weights import load_into

if TYPE_CHECKING:
    from fdl.federation.state import Federation


log = logging.getLogger("fdl")

_LOG_EVERY = 5.0
"""Seconds between log lines about the progress."""

Sizes = dict[str, dict[int, int]]


def estimate_bytes(loop: Federation, round: int = 1) -> Sizes:
    """Measure the bytes of one round by a dry run, with the limits of `estimate_rounds`.

    Args:
        loop: a freshly built loop; its state is restored afterwards.
        round: the round to measure; earlier ones are run dry, too.

    Returns:
        ``{"down": {client: bytes}, "up": {client: bytes}}``.
    """
    return estimate_rounds(loop, round)[-1]


def estimate_rounds(loop: Federation, rounds: int) -> list[Sizes]:
    """Run rounds with all clients but without training, and measure their encoded messages.

    Sizes are exact if a codec's output does not depend on the values; an entropy coder usually compresses a little
    better once models are trained. Later rounds may differ from the first, in which the server has no aggregate to send
    yet.

    Args:
        loop: a freshly built loop; its state is restored afterwards.
        rounds: number of rounds to measure.

    Returns:
        One dict per round, ``{"down": {client: bytes}, "up": {client: bytes}}``.
    """
    server = loop.server
    ledger, server_state = loop.ledger.state_dict(), dict(server.state)
    client_states = [dict(client.state) for client in loop.clients]
    student = None if server.student is None else copy_of(server.student)
    with loop.runtime.dry_run():
        loop.start_round(0)
        loop.method.setup(server, loop.clients)
        for number in range(1, rounds + 1):
            _dry_round(loop, number, learn=number < rounds)
    sizes: list[Sizes] = [{d: {client.id: 0 for client in loop.clients} for d in ("down", "up")} for _ in range(rounds)]
    for row in loop.ledger.rows():
        if row.direction in ("down", "up") and 1 <= row.round <= rounds:
            sizes[row.round - 1][row.direction][row.client] += row.bytes
    loop.ledger.load_state_dict(ledger)
    server.state = server_state
    if student is not None:
        load_into(server.student, student)
    for client, state in zip(loop.clients, client_states):
        client.state = state
    loop.start_round(0)
    return sizes


def _dry_round(loop: Federation, round: int, learn: bool) -> None:
    """Exchange one round of messages; with `learn`, also aggregate them, for the next round's downloads."""
    loop.start_round(round)
    aggregate = loop.method.aggregate(loop.server) if learn else None
    logged = time.monotonic()
    for place, client in enumerate(loop.clients):
        if client.id in loop.left_out:
            continue
        if time.monotonic() - logged > _LOG_EVERY:
            log.info("still measuring: round %d, client %d of %d", round, place + 1, len(loop.clients))
            logged = time.monotonic()
        if loop.server.arrival is not None and len(client.train) == 0:  # as in a run: skipped while it has no data
            continue
        try:
            for _, upload in loop.executor(loop.method, [(client, loop.download_for(client.id))]):
                received = loop.channel.upload(upload, client.id, round)
                if aggregate is not None and received is not None:
                    aggregate.add(received, client.id)
        except RejectedMessageError:  # as in a run: the bytes were sent, and the round continues
            continue
    knowledge = None if aggregate is None else aggregate.result()
    if knowledge is not None:
        loop.method.server_update(loop.server, knowledge)
