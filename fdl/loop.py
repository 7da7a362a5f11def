"""The federated round. Read this file first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl import snapshot
from fdl.callbacks.base import Callback, CallbackList
from fdl.errors import RefusedError
from fdl.evaluation import evaluate
from fdl.interrupts import Interrupts
from fdl.report import summarise
from fdl.runtime import seed_everything
from fdl.seeding import numpy_stream

if TYPE_CHECKING:
    from fdl.comm.channel import Channel
    from fdl.executor import Executor
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client, Server
    from fdl.recipe import Recipe


class FederatedLoop:
    """Runs the rounds of one recipe: send, train, receive, aggregate, distil, evaluate, save.

    Args:
        recipe: the resolved recipe.
        folder: the run's folder.
        method: the federated algorithm.
        server: the coordinator.
        clients: all institutions, by id.
        channel: what carries messages and counts their bytes.
        executor: how clients take turns.
        callbacks: what watches the run.
        fingerprint: of the data and who holds which; a resumed run must find the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        method: Method,
        server: Server,
        clients: Sequence[Client],
        channel: Channel,
        executor: Executor,
        callbacks: Sequence[Callback] = (),
        fingerprint: str = "",
    ):
        self.recipe, self.folder, self.method = recipe, folder, method
        self.server, self.clients, self.channel, self.executor = server, list(clients), channel, executor
        self.callbacks, self.fingerprint = CallbackList(callbacks), fingerprint
        self.runtime, self.ledger = server.runtime, channel.ledger
        self.rounds, self.round = recipe.federation.rounds, 0
        self.resumed_from: int | None = None
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.stopped: str | None = None

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Run all rounds that are left and return the summary.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the round in progress is finished and saved.
            UserError: when `resume` finds no good checkpoint.
        """
        if resume:
            snapshot.restore(self)
        self.callbacks.on_fit_start(self)
        try:
            with Interrupts() as interrupts:
                if not resume:
                    self.set_up()
                while self.round < self.rounds and self.stopped is None:
                    if interrupts.requested:
                        snapshot.save(self)
                        raise KeyboardInterrupt
                    self.run_round(self.round + 1)
        except BaseException as error:
            self.callbacks.on_exception(self, error)
            raise
        summary = summarise(self)
        self.callbacks.on_fit_end(self, summary)
        return summary

    def run_round(self, round: int) -> None:
        """Run one round, from the first download to the record in `history`."""
        self.begin(round)
        self.callbacks.on_round_start(self, round)
        cohort, dropped = self.cohort(round)
        record: dict[str, Any] = {"round": round, "cohort": cohort, "dropped": dropped, "refused": {}, "clients": {}}

        # 1  the cohort is sent what the server has to say; who drops out receives it and is not heard again
        turns = ((self.clients[i], self.send(i)) for i in cohort)
        present = (turn for turn in turns if turn[0].id not in dropped)

        # 2  every client works on its own data and answers; an answer that cannot be used is refused and counted
        aggregate = self.method.aggregate(self.server)
        with self.timed("clients"):
            for client, upload in self.executor(self.method, present):
                record["clients"][str(client.id)] = client.metrics
                try:
                    received = self.channel.upload(upload, client.id, round)
                    if aggregate is not None and received is not None:
                        aggregate.add(received, client.id)
                except RefusedError as refusal:
                    self.ledger.refuse(round, client.id, refusal.reason)
                    record["refused"][str(client.id)] = refusal.reason
                self.callbacks.on_client_end(self, round, client.id, client.metrics)

        # 3  what they know together; nothing, when nobody was heard
        knowledge = aggregate.result() if aggregate is not None else None

        # 4  the server learns from it
        with self.timed("server"):
            if aggregate is None or knowledge is not None:
                seed_everything(self.recipe.seed, "server", round)
                self.server.metrics.update(self.method.server_update(self.server, knowledge))
        record["metrics"] = self.server.metrics

        # evaluate, log, save
        last = round == self.rounds
        if last or round % self.recipe.evaluation.every == 0:
            with self.timed("evaluate"):
                evaluate(self.server, self.clients, self.recipe.evaluation, record)
        record["communication"], record["seconds"] = self.ledger.totals(), dict(self.seconds)
        self.history.append(record)
        self.round = round
        self.callbacks.on_round_end(self, record)
        if last or self.stopped is not None or round % self.recipe.checkpoint.every == 0:
            snapshot.save(self)

    def begin(self, round: int) -> None:
        """Tell everybody which round it is."""
        for participant in (self.server, *self.clients):
            participant.begin(round)

    def cohort(self, round: int) -> tuple[list[int], list[int]]:
        """Who takes part in a round, and who of them drops out before answering; both sorted."""
        federation = self.recipe.federation
        size = int(federation.participation * len(self.clients) + 0.5)
        stream = numpy_stream(self.recipe.seed, "cohort", round)
        chosen = sorted(stream.choice(len(self.clients), size=size, replace=False).tolist())
        lost = stream.random(size) < federation.dropout
        return chosen, [client for client, gone in zip(chosen, lost) if gone]

    def send(self, client: int) -> Message | None:
        """Carry the server's word of this round to a client."""
        return self.channel.download(self.method.download(self.server, client), client, self.server.round)

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this round."""
        self.stopped = reason

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of a block to a part of the run."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def set_up(self) -> None:
        """Prepare the first round: the method's first state, what must be sent in advance, a first checkpoint."""
        self.begin(0)
        with self.timed("server"):
            seed_everything(self.recipe.seed, "setup")
            self.method.setup(self.server, self.clients)
            for kind, size in self.method.setup_bytes(self.server).items():
                for client in self.clients:
                    self.channel.setup_cost(kind, size, client.id)
        snapshot.save(self)
