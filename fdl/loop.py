"""The federated round. Read this file first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.adversaries.coalition import Adversaries
from fdl.attacks.callback import attack
from fdl.callbacks.base import Callback, CallbackList
from fdl.engine.runtime import seed_everything
from fdl.errors import memory_of
from fdl.federation import snapshot
from fdl.federation.client_placement import Spread
from fdl.federation.client_sampling import draw
from fdl.federation.divergence import require_finite, require_heard, warn_unheard
from fdl.federation.evaluation import ask, evaluate
from fdl.federation.exchange import hear, speak
from fdl.federation.round_record import account
from fdl.federation.summary import summarise
from fdl.state.client_store import CLIENTS
from fdl.utils.interrupts import Interrupted, Interrupts
from fdl.utils.stopwatch import Stopwatch
from fdl.utils.threads import pinned

if TYPE_CHECKING:
    from fdl.attacks.base import Attack
    from fdl.comm.channel import Channel
    from fdl.evaluators.base import Evaluator
    from fdl.federation.executors import Executor
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client, Server
    from fdl.recipe.config import Recipe
    from fdl.state.client_store import DiskStore


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
        probes: further questions to the student.
        attacks: what is tried on private data after the last round.
        adversaries: the dishonest among the clients; None: nobody is.
        store: where clients' states lie between their turns; None: in memory.
        left_out: why clients take no part at all, by id.

    Attributes:
        on_summary: given the summary as soon as the rounds are done, before attacks and callbacks, which may fail.
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
        probes: Sequence[Evaluator] = (),
        attacks: Sequence[Attack] = (),
        adversaries: Adversaries | None = None,
        store: DiskStore | None = None,
        left_out: Mapping[int, str] | None = None,
    ):
        self.left_out = dict(left_out or {})
        self.recipe, self.folder, self.method = recipe, folder, method
        self.server, self.clients, self.channel, self.executor = server, list(clients), channel, executor
        self.callbacks, self.fingerprint, self.probes = CallbackList(callbacks), fingerprint, probes
        self.attacks, self.audit = attacks, None
        self.runtime, self.ledger = server.runtime, channel.ledger
        self.spread = Spread(self.runtime.ranks, self.clients, channel, folder / CLIENTS)
        self.adversaries, self.store = adversaries or Adversaries(), store
        self.rounds, self.round = recipe.federation.rounds, 0
        self.resumed_from: int | None = None
        self.history: list[dict[str, Any]] = []
        self.seconds = self.runtime.clock = channel.clock = Stopwatch()
        self.stopped: str | None = None
        self.on_summary: Callable[[Mapping[str, Any]], object] = lambda summary: None

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
            with Interrupts() as interrupts:
                if not resume:
                    self.set_up()
                while self.round < self.rounds and self.stopped is None:
                    if number := self.runtime.ranks.highest(interrupts.requested):
                        snapshot.save(self)
                        raise Interrupted(number, saved=True)
                    self.run_round(self.round + 1)
            require_heard(self)
            if self.stopped is not None and self.server.student is not None and self.runtime.ranks.asks:
                ask(self.server, self.probes, self.history[-1]["metrics"])
            if self.attacks:
                self.on_summary(summarise(self))
                attack(self)
            summary = summarise(self)
            self.on_summary(summary)
            self.callbacks.on_fit_end(self, summary)
        except BaseException as error:
            self.callbacks.on_exception(self, error)
            self.runtime.ranks.explain(error)
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
        turns = speak(self, self.spread.place(cohort), dropped, record)

        # 2  every client works on its own data and answers; an answer that cannot be used is refused and counted
        aggregate = self.method.aggregate(self.server)
        with self.seconds("clients"):
            honest = self.executor(self.method, self.adversaries.listen(round, turns))
            with self.channel.unconfirmed():
                hear(self, honest, aggregate, record)
        warn_unheard(self, record)

        # 3  what they know together; nothing, when nobody was heard
        with self.seconds("clients"), self.seconds.part("aggregate"):
            knowledge = aggregate.result() if aggregate is not None else None

        # 4  the server learns from it
        hint = memory_of(f"the server in round {round}", "distil.batch_size")
        with self.seconds("server"), self.runtime.jointly(), hint:
            if aggregate is None or knowledge is not None:
                seed_everything(self.recipe.seed, "server", round)
                self.server.metrics.update(self.method.server_update(self.server, knowledge))
        record["metrics"] = self.server.metrics
        require_finite(self, round)

        # evaluate, log, save
        last = round == self.rounds
        if last or round % self.recipe.evaluation.every == 0:
            with self.seconds("evaluate"), memory_of(f"evaluation in round {round}", "evaluation.batch_size"):
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

    def begin(self, round: int) -> None:
        """Tell everybody which round it is."""
        for participant in (self.server, *self.clients):
            participant.begin(round)

    def cohort(self, round: int) -> tuple[list[int], list[int]]:
        """Who is asked in a round, and who of them drops out; whoever has no data yet, or none any more, sits out."""
        asked, dropped = draw(self.recipe.federation, len(self.clients), self.recipe.seed, round)
        if self.left_out:
            asked, dropped = ([c for c in ids if c not in self.left_out] for ids in (asked, dropped))
        if self.server.arrival is not None:
            asked, dropped = ([c for c in ids if len(self.clients[c].train)] for ids in (asked, dropped))
        return self.channel.reach(asked, dropped, round)

    def send(self, client: int) -> Message | None:
        """Carry the server's word of this round to a client."""
        return self.channel.download(self.method.download(self.server, client), client, self.server.round)

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this round."""
        self.stopped = reason

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
