"""The federated round. Read this file first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.callbacks.base import Callback, CallbackList
from fdl.engine.runtime import seed_everything
from fdl.errors import explain_out_of_memory
from fdl.federation import snapshot
from fdl.federation.divergence import require_finite, require_heard, warn_unheard
from fdl.federation.evaluation import evaluate, run_probes
from fdl.federation.exchange import broadcast, collect_uploads
from fdl.federation.round_record import account
from fdl.federation.state import Federation
from fdl.federation.summary import summarise
from fdl.utils.interrupts import GracefulShutdown, Interrupted
from fdl.utils.threads import pinned

if TYPE_CHECKING:
    from fdl.comm.channel import Channel
    from fdl.federation.executors import Executor
    from fdl.methods.base import Method
    from fdl.participants import Client, Server
    from fdl.recipe.config import Recipe


class FederatedLoop(Federation):
    """Runs the rounds of one recipe: send, train, receive, aggregate, distil, evaluate, save.

    Args:
        recipe: as in `Federation`, like all that is not named here.
        callbacks: what watches the run.
        after_rounds: what is done with the federation once all rounds are done, e.g. attacks on what it sent.
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
        after_rounds: Sequence[Callable[[FederatedLoop], None]] = (),
        **more: Any,
    ):
        listeners = CallbackList(callbacks)
        super().__init__(recipe, folder, method, server, clients, channel, executor, listeners, **more)
        self.after_rounds = after_rounds

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Run all rounds that are left and return the summary.

        Raises:
            Interrupted: after Ctrl-C or another signal to stop, once the round in progress is finished and saved.
            UserError: when `resume` finds no good checkpoint, or the folder holds another run without it; when training
                diverges, or no message of any client could be used; when another process of the run is gone.
        """
        with pinned(self.recipe.fabric.threads):
            return self._run(resume)

    def _run(self, resume: bool) -> dict[str, Any]:
        if resume:
            snapshot.restore(self)
        elif self.runtime.ranks.leader:
            snapshot.require_vacant(self.folder)
        try:
            self.callbacks.on_fit_start(self)
            with GracefulShutdown() as interrupts:
                if not resume:
                    self.set_up()
                while self.round < self.rounds and self.stopped is None:
                    if number := self.runtime.ranks.max_number(interrupts.requested):
                        snapshot.save(self)
                        raise Interrupted(number, saved=True)
                    self.run_round(self.round + 1)
            require_heard(self)
            if self.stopped is not None and self.server.student is not None and self.runtime.ranks.evaluates_server:
                run_probes(self.server, self.probes, self.history[-1]["metrics"])
            for finish in self.after_rounds:
                self.on_summary(summarise(self))
                finish(self)
            summary = summarise(self)
            self.on_summary(summary)
            self.callbacks.on_fit_end(self, summary)
        except BaseException as error:
            self.callbacks.on_exception(self, error)
            self.runtime.ranks.wrap_lost_peer(error)
            raise
        return summary

    def run_round(self, round: int) -> None:
        """Run one round, from the first download to the record in `history`."""
        self.begin(round)
        self.callbacks.on_round_start(self, round)
        cohort, dropped = self.cohort(round)
        self.server.cohort = cohort
        record: dict[str, Any] = {"round": round, "cohort": cohort, "dropped": dropped, "refused": {}, "clients": {}}

        # 1  the cohort is sent what the server has to say; who drops out receives it and is not heard again
        turns = broadcast(self, self.spread.place(cohort), dropped, record)

        # 2  every client works on its own data and answers; an answer that cannot be used is refused and counted
        aggregate = self.method.aggregate(self.server)
        with self.seconds("clients"):
            honest = self.executor(self.method, self.adversaries.listen(round, turns))
            with self.channel.unconfirmed():
                collect_uploads(self, honest, aggregate, record)
        warn_unheard(self, record)

        # 3  what they know together; nothing, when nobody was heard
        with self.seconds("clients"), self.seconds.part("aggregate"):
            knowledge = aggregate.result() if aggregate is not None else None

        # 4  the server learns from it
        hint = explain_out_of_memory(f"the server in round {round}", "distil.batch_size")
        with self.seconds("server"), self.runtime.jointly(), hint:
            if aggregate is None or knowledge is not None:
                seed_everything(self.recipe.seed, "server", round)
                self.server.metrics.update(self.method.server_update(self.server, knowledge))
        record["metrics"] = self.server.metrics
        require_finite(self, round)

        # evaluate, log, save
        last = round == self.rounds
        if last or round % self.recipe.evaluation.every == 0:
            with (
                self.seconds("evaluate"),
                explain_out_of_memory(f"evaluation in round {round}", "evaluation.batch_size"),
            ):
                evaluate(self, record, last)
        self.server.rest()
        account(self.ledger, record, self.history)
        record["seconds"] = dict(self.seconds)
        self.history.append(record)
        self.round = round
        self.callbacks.on_round_end(self, record)
        if self.runtime.ranks.any(self.stopped is not None):  # callbacks watch on one rank, and stop all
            self.stopped = self.stopped or "as the leading process was asked to"
        if last or self.stopped is not None or round % self.recipe.checkpoint.every == 0:
            snapshot.save(self)
        else:
            snapshot.save_best(self)

    def set_up(self) -> None:
        """Prepare the first round: the method's first state, what must be sent in advance, a first checkpoint."""
        self.begin(0)
        with self.seconds("server"), self.runtime.jointly():
            seed_everything(self.recipe.seed, "setup")
            self.method.setup(self.server, self.clients)
            for kind, size in self.method.setup_bytes(self.server).items():
                for client in self.clients:
                    if client.id not in self.left_out:
                        self.channel.setup_cost(kind, size, client.id)
        self.server.rest()
        snapshot.save(self)
