"""State of a federation between two rounds: participants, channel, placement, history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fdl.adversaries.coalition import Adversaries
from fdl.federation.client_placement import ClientPlacement
from fdl.federation.client_sampling import sample_cohort
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
    """The interface of callbacks to the federation: events of a round, and a checkpointed state."""

    def on_client_end(self, federation: Any, round: int, client: int, metrics: dict[str, float]) -> None:
        """Handle the end of a client's turn: its upload has arrived, or was rejected."""

    def on_checkpoint(self, federation: Any, path: Path) -> None:
        """Handle a new checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""


class Federation:
    """The state of a run: all objects that rounds read and change.

    Args:
        recipe: the resolved recipe.
        folder: the run's folder.
        method: the federated algorithm.
        server: the coordinator.
        clients: all institutions, by id.
        channel: carries messages as bytes, and counts them.
        executor: runs the local updates of a cohort.
        callbacks: called at the events of a run.
        fingerprint: hash of the data and of their partition; a resumed run must find the same.
        probes: evaluators of the student, besides its metrics on validation and test samples.
        adversaries: the dishonest clients; None: all are honest.
        store: keeps clients' states on disk between their turns; None: in memory.
        left_out: clients that take part in no round, with the reason, by id.

    Attributes:
        runtime: trains models and predicts with them.
        ledger: the bytes of every message.
        placement: the assignment of clients to ranks.
        rounds: the number of rounds of the run.
        round: the last round that is done.
        resumed_from: the round after which this process resumed the run; None if it started it.
        history: the record of each round.
        seconds: wall time by part of a round.
        awaited: number of rounds, of those run by this process, with an aggregate that awaited uploads.
        stopped: the reason for ending the run early; None while it continues.
        audit: results of attacks on the finished run, set by a callback; None without.
        on_summary: called with the summary as soon as the rounds are done, before callbacks, which may fail.
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
        self.placement = ClientPlacement(self.runtime.ranks, self.clients, channel, folder / CLIENTS)
        self.rounds, self.round = recipe.federation.rounds, 0
        self.resumed_from: int | None = None
        self.history: list[dict[str, Any]] = []
        self.seconds = self.runtime.clock = channel.clock = Stopwatch()
        self.stopped: str | None = None
        self.awaited = 0
        self.audit: Any = None
        self.on_summary: Callable[[Mapping[str, Any]], object] = lambda summary: None

    def start_round(self, round: int) -> None:
        """Start a round at every participant.

        Args:
            round: its number, from 1; 0 for the setup.
        """
        for participant in (self.server, *self.clients):
            participant.start_round(round)

    def cohort(self, round: int) -> tuple[list[int], list[int]]:
        """Sample the clients of a round, among those that have data in it.

        Args:
            round: its number, from 1.

        Returns:
            Ids of the cohort, and of those in it that receive the download but drop out before they upload.
        """
        cohort, dropped = sample_cohort(self.recipe.federation, len(self.clients), self.recipe.seed, round)
        if self.left_out:
            cohort, dropped = ([c for c in ids if c not in self.left_out] for ids in (cohort, dropped))
        if self.server.arrival is not None:
            cohort, dropped = ([c for c in ids if len(self.clients[c].train)] for ids in (cohort, dropped))
        return self.channel.reach(cohort, dropped, round)

    def download_for(self, client: int) -> Message | None:
        """Send a client the server's message of the current round.

        Args:
            client: its id.

        Returns:
            The message that arrives; None if the method sends nothing.

        Raises:
            RejectedMessageError: the message that arrived cannot be used.
        """
        message = self.method.download(self.server, client)
        require_message(message, f"method {type(self.method).__name__}: download for client {client}")
        return self.channel.download(message, client, self.server.round)

    def stop(self, reason: str) -> None:
        """End the run after the current round.

        Args:
            reason: the reason, for the log.
        """
        self.stopped = reason
