"""The federated round. Read this file first."""

from __future__ import annotations

from typing import Any

from fdl.callbacks.base import CallbackList
from fdl.engine.runtime import seed_everything
from fdl.errors import explain_out_of_memory
from fdl.federation import snapshot
from fdl.federation.divergence import require_finite, require_uploads, warn_without_uploads
from fdl.federation.evaluation import evaluate, run_probes
from fdl.federation.exchange import RoundExchange
from fdl.federation.round_record import add_costs
from fdl.federation.state import Federation
from fdl.federation.summary import summarise
from fdl.utils.interrupts import GracefulShutdown, Interrupted
from fdl.utils.threads import pinned


class FederatedLoop(Federation):
    """Runs the rounds of one recipe: broadcast, local updates, aggregation, server update, evaluation, checkpoint.

    `Federation` holds the state that rounds read and change, and documents the arguments; this class defines their
    order.
    """

    callbacks: CallbackList

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Run all remaining rounds and return the summary.

        Args:
            resume: continue from the newest checkpoint in the run's folder.

        Raises:
            Interrupted: after Ctrl-C or another signal to stop, once the round in progress is finished and saved.
            UserError: there is no valid checkpoint to resume from, or the folder holds another run; training diverges,
                or no message of any client could be used; another process of the run has ended.
        """
        with pinned(self.recipe.fabric.threads):
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
                require_uploads(self.method, self.history, self.awaited, self.ledger, self.runtime.ranks)
                if self.stopped is not None and self.server.student is not None and self.runtime.ranks.evaluates_server:
                    run_probes(self.server, self.probes, self.history[-1]["metrics"])
                summary = summarise(self)
                self.on_summary(summary)
                self.callbacks.on_fit_end(self, summary)
            except BaseException as error:
                self.callbacks.on_exception(self, error)
                self.runtime.ranks.wrap_lost_peer(error)
                raise
        return summary

    def set_up(self) -> None:
        """Prepare the first round: initialise the method, count one-time downloads, write a first checkpoint."""
        self.start_round(0)
        with self.seconds("server"), self.runtime.all_ranks():
            seed_everything(self.recipe.seed, "setup")
            self.method.setup(self.server, self.clients)
            for kind, size in self.method.setup_bytes(self.server).items():
                for client in self.clients:
                    if client.id not in self.left_out:
                        self.channel.setup_cost(kind, size, client.id)
        self.server.round_trip_state()
        snapshot.save(self)

    def run_round(self, round: int) -> None:
        """Run one round, from the first download to the record in `history`.

        Args:
            round: its number, from 1.
        """
        self.start_round(round)
        self.callbacks.on_round_start(self, round)
        cohort, dropped = self.cohort(round)
        self.server.cohort = cohort
        record: dict[str, Any] = {"round": round, "cohort": cohort, "dropped": dropped, "refused": {}, "clients": {}}
        exchange = RoundExchange(self.method, record, self.channel, self.placement, self.adversaries, self.seconds)

        # 1  broadcast: every client of the cohort receives its download
        downloads = exchange.broadcast(self.placement.place(cohort), self.download_for)

        # 2  local updates: clients train on their private data and upload; an upload that cannot be used is rejected
        aggregate = self.method.aggregate(self.server)
        with self.seconds("clients"), self.channel.unconfirmed():
            turns = self.executor(self.method, self.adversaries.record_downloads(round, downloads))
            exchange.collect(turns, aggregate, lambda *turn: self.callbacks.on_client_end(self, round, *turn))
        self.awaited += aggregate is not None
        warn_without_uploads(self.method, self.history, record, self.awaited, self.ledger)

        # 3  aggregation: None if no usable upload arrived
        with self.seconds("clients"), self.seconds.part("aggregate"):
            knowledge = aggregate.result() if aggregate is not None else None

        # 4  server update: the student learns from the aggregate
        memory = explain_out_of_memory(f"the server in round {round}", "server_distil.batch_size")
        with self.seconds("server"), self.runtime.all_ranks(), memory:
            if aggregate is None or knowledge is not None:
                seed_everything(self.recipe.seed, "server", round)
                self.server.metrics.update(self.method.server_update(self.server, knowledge))
        record["metrics"] = self.server.metrics
        require_finite(self.server, round)

        # 5  evaluation of the student and the specialists
        last = round == self.rounds
        if last or round % self.recipe.evaluation.every == 0:
            memory = explain_out_of_memory(f"evaluation in round {round}", "evaluation.batch_size")
            with self.seconds("evaluate"), memory:
                evaluate(self, record, last)
        self.server.round_trip_state()

        # 6  record, callbacks, checkpoint
        add_costs(record, self.ledger, self.history)
        record["seconds"] = dict(self.seconds)
        self.history.append(record)
        self.round = round
        self.callbacks.on_round_end(self, record)
        if self.runtime.ranks.any(self.stopped is not None):  # callbacks run on one rank, and stop all
            self.stopped = self.stopped or "as requested in the leading process"
        if last or self.stopped is not None or round % self.recipe.checkpoint.every == 0:
            snapshot.save(self)
        else:
            snapshot.save_best(self)
