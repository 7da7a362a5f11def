"""Base classes of simulated faults, and their schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fdl.errors import UserError
from fdl.utils.seeding import numpy_stream

#: Returns a fault's own random stream for one client in a given round.
Stream = Callable[[int], np.random.Generator]


@dataclass
class ClientFault:
    """Faults of one client in one round.

    Attributes:
        absent: the server cannot reach the client, so it is not in the cohort.
        silent: the client receives the download, does no work and uploads nothing.
        arrives: share of each message of its upload that arrives; below 1 the messages are truncated.
        finite: False if all real numbers of its upload are NaN.
        seconds: simulated computing time.
    """

    absent: bool = False
    silent: bool = False
    arrives: float = 1.0
    finite: bool = True
    seconds: float = 0.0


class Fault(ABC):
    """Simulated failure of clients.

    Its effect depends on the seed, the round and the client alone, so a run with faults can be repeated, resumed and
    distributed over processes like any other. A client whose upload is lost or rejected has still done its work: its
    own state is updated, and only the server has received nothing.

    Args:
        clients: ids of the clients that it may affect; None: all.
    """

    name: ClassVar[str]

    def __init__(self, clients: list[int] | None = None):
        self.clients = None if clients is None else list(clients)

    def applies_to(self, client: int) -> bool:
        """Return True if the fault may affect a client, given by its id."""
        return self.clients is None or client in self.clients

    @abstractmethod
    def apply(self, fault: ClientFault, round: int, stream: Stream) -> None:
        """Record in `fault` the effect on a client in a round.

        Args:
            fault: the client's faults of the round so far; changed in place.
            round: the round, from 1.
            stream: returns the client's random stream of any round, for this fault alone.
        """


class ByChance(Fault):
    """Fault that occurs with some probability, independently per client and round.

    Args:
        chance: probability per client and round, in [0, 1].
        clients: ids of the clients that it may affect; None: all.
    """

    def __init__(self, chance: float, clients: list[int] | None = None):
        if not 0 <= chance <= 1:
            raise UserError(f"chance must be in [0, 1], got {chance}")
        super().__init__(clients)
        self.chance = chance

    def triggers(self, stream: np.random.Generator) -> bool:
        """Draw whether the fault occurs, with the first number of the client's random stream of the round."""
        return bool(stream.random() < self.chance)


class Schedule:
    """Faults of every client in every round.

    Args:
        faults: in the order of the recipe; each has its own random streams.
        seed: the recipe's seed.
    """

    def __init__(self, faults: Sequence[Fault], seed: int):
        self.faults, self._seed = tuple(faults), seed

    def fault_of(self, round: int, client: int) -> ClientFault:
        """Return the faults of a client in a round (from 1)."""
        fault = ClientFault()
        for number, kind in enumerate(self.faults):
            if kind.applies_to(client):
                kind.apply(fault, round, self._stream(f"fault/{number}/{kind.name}", client))
        return fault

    def cohort(self, asked: Sequence[int], dropped: Sequence[int], round: int) -> tuple[list[int], list[int]]:
        """Apply the round's faults to a cohort.

        Args:
            asked: ids of the sampled clients.
            dropped: ids among them that upload nothing, faults aside.
            round: the round, from 1.

        Returns:
            The ids that can be reached, and the ids among them that upload nothing.
        """
        faults = {client: self.fault_of(round, client) for client in asked}
        present = [client for client in asked if not faults[client].absent]
        return present, [client for client in present if client in dropped or faults[client].silent]

    def _stream(self, purpose: str, client: int) -> Stream:
        return lambda round: numpy_stream(self._seed, purpose, round, client)
