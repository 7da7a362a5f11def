"""What a fault is, and the schedule that several of them make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fdl.errors import UserError
from fdl.utils.seeding import numpy_stream

#: Gives a fault's own stream of one client in a round.
Stream = Callable[[int], np.random.Generator]


@dataclass
class ClientFault:
    """What befalls one client in one round.

    Attributes:
        absent: the server cannot reach it, so it is not asked.
        silent: it is sent the server's message, does nothing, and is not heard.
        arrives: share of each of its upload's messages that arrives; below 1 they break off.
        finite: whether its upload holds numbers; if not, all real ones are NaN.
        seconds: time that it computes, in a simulation.
    """

    absent: bool = False
    silent: bool = False
    arrives: float = 1.0
    finite: bool = True
    seconds: float = 0.0


class Fault(ABC):
    """Something that goes wrong at clients.

    What it does depends on the seed, the round and the client alone, so a run with faults can be repeated, resumed and
    spread over processes like any other. A client that was asked and whose upload is lost or refused has done its work
    all the same: its own state goes on, and the server has not heard of it.

    Args:
        clients: ids of those whom it may befall; None: all.
    """

    name: ClassVar[str]

    def __init__(self, clients: list[int] | None = None):
        self.clients = None if clients is None else list(clients)

    def concerns(self, client: int) -> bool:
        """Tell whether it may befall a client."""
        return self.clients is None or client in self.clients

    @abstractmethod
    def befall(self, fate: ClientFault, round: int, stream: Stream) -> None:
        """Note in a client's fate what this fault does to it in a round (from 1).

        Args:
            fate: what other faults do to it already.
            round: the round.
            stream: gives the client's stream of any round, for this fault alone.
        """


class ByChance(Fault):
    """A fault that befalls a client in a round with some probability.

    Args:
        chance: of each client in each round, in [0, 1].
        clients: as for every fault.
    """

    def __init__(self, chance: float, clients: list[int] | None = None):
        if not 0 <= chance <= 1:
            raise UserError(f"chance must be in [0, 1], got {chance}")
        super().__init__(clients)
        self.chance = chance

    def strikes(self, stream: np.random.Generator) -> bool:
        """Draw whether it befalls the client: the first number of its stream."""
        return bool(stream.random() < self.chance)


class Schedule:
    """What befalls every client in every round.

    Args:
        faults: in the order of the recipe; each has streams of its own.
        seed: the recipe's seed.
    """

    def __init__(self, faults: Sequence[Fault], seed: int):
        self.faults, self._seed = tuple(faults), seed

    def fate(self, round: int, client: int) -> ClientFault:
        """Return what befalls a client in a round."""
        fate = ClientFault()
        for number, fault in enumerate(self.faults):
            if fault.concerns(client):
                fault.befall(fate, round, self._stream(f"fault/{number}/{fault.name}", client))
        return fate

    def cohort(self, asked: Sequence[int], dropped: Sequence[int], round: int) -> tuple[list[int], list[int]]:
        """Return who is asked in a round and who of them is not heard, given who would be without faults."""
        fates = {client: self.fate(round, client) for client in asked}
        present = [client for client in asked if not fates[client].absent]
        return present, [client for client in present if client in dropped or fates[client].silent]

    def _stream(self, purpose: str, client: int) -> Stream:
        return lambda round: numpy_stream(self._seed, purpose, round, client)
