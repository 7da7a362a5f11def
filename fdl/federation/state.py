"""A federation between two rounds: its participants, what joins them, and what has happened so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fdl.adversaries.coalition import Adversaries
from fdl.federation.client_placement import ClientPlacement
from fdl.federation.client_sampling import draw
from fdl.messages import require_message
from fdl.state.client_store import CLIENTS
from fdl.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from fdl.comm.channel import Channel
    from fdl.evaluators.base import Evaluator
    from fdl.federation.executors import Executor
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client, Server
    from fdl.recipe.config import Recipe
    from fdl.state.client_store import DiskStore


class Listeners(Protocol):
    """What is told of events and has a state that checkpoints carry."""

    def on_client_end(self, federation: Any, round: int, client: int, metrics: dict[str, float]) -> None:
        """A client's upload has come in."""

    def on_checkpoint(self, federation: Any, path: Path) -> None:
        """A checkpoint was written."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what a checkpoint kept."""


class Federation:
    """The state of a run: everything that rounds read and change.

    Args:
        recipe: the resolved recipe.
        folder: the run's folder.
        method: the federated algorithm.
        server: the coordinator.
        clients: all institutions, by id.
        channel: what carries messages and counts their bytes.
        executor: how clients take turns.
        callbacks: what is told of events.
        fingerprint: of the data and who holds which; a resumed run must find the same.
        probes: further questions to the student.
        adversaries: the dishonest among the clients; None: nobody is.
        store: where clients' states lie between their turns; None: in memory.
        left_out: why clients take no part at all, by id.

    Attributes:
        runtime: how models are trained and asked.
        ledger: the bytes of every message.
        spread: which process holds which client.
        rounds: how many there are to be.
        round: the last one that is done.
        resumed_from: the round after which this process went on, None where it began.
        history: a record of each round.
        seconds: where the time went.
        awaited: number of rounds, of those run by this process, in which clients had something to send.
        stopped: why the run ends early, None while it does not.
        audit: what attacks on the finished run found, None where there were none.
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
        callbacks: Listeners,
        fingerprint: str = "",
        probes: Sequence[Evaluator] = (),
        adversaries: Adversaries | None = None,
        store: DiskStore | None = None,
        left_out: Mapping[int, str] | None = None,
    ):
        self.recipe, self.folder, self.method = recipe, folder, method
        self.server, self.clients, self.channel, self.executor = server, list(clients), channel, executor
        self.callbacks, self.fingerprint, self.probes = callbacks, fingerprint, probes
        self.adversaries, self.store = adversaries or Adversaries(), store
        self.left_out = dict(left_out or {})
        self.runtime, self.ledger = server.runtime, channel.ledger
        self.spread = ClientPlacement(self.runtime.ranks, self.clients, channel, folder / CLIENTS)
        self.rounds, self.round = recipe.federation.rounds, 0
        self.resumed_from: int | None = None
        self.history: list[dict[str, Any]] = []
        self.seconds = self.runtime.clock = channel.clock = Stopwatch()
        self.stopped: str | None = None
        self.awaited = 0
        self.audit: Any = None
        self.on_summary: Callable[[Mapping[str, Any]], object] = lambda summary: None

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
        message = self.method.download(self.server, client)
        require_message(message, f"method {type(self.method).__name__}: download for client {client}")
        return self.channel.download(message, client, self.server.round)

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this round."""
        self.stopped = reason
