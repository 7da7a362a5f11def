"""Faults of clients: dropout, stragglers, NaN uploads and late joins."""

from __future__ import annotations

import math
from typing import Literal, get_args

from fdl.errors import UserError
from fdl.faults.base import ByChance, ClientFault, Fault, Stream

When = Literal["before", "during", "after"]


class Vanish(ByChance):
    """Dropout of a client before, during or after its upload, possibly for several rounds.

    Before: the client receives the download and does no work. During: the client has done its work, and only a part of
    its upload arrives, which is rejected; all of it counts as sent. After: its upload is used. When the client returns
    it continues from its last state, which is then stale by as many rounds as it was away.

    Args:
        chance: probability per client and round, in [0, 1].
        when: ``"before"``, ``"during"`` or ``"after"`` the upload.
        away: number of following rounds in which the client cannot be reached.
        clients: ids of the clients that it may affect; None: all.
    """

    name = "dropout"

    def __init__(self, chance: float, when: When = "during", away: int = 0, clients: list[int] | None = None):
        super().__init__(chance, clients)
        if when not in get_args(When):
            raise UserError(f"when must be {', '.join(get_args(When))}, got {when!r}")
        if away < 0:
            raise UserError(f"away must be at least 0 rounds, got {away}")
        self.when, self.away = when, away

    def apply(self, fault: ClientFault, round: int, stream: Stream) -> None:
        """Mark the client absent after an earlier dropout, and apply a dropout of this round."""
        if any(self.triggers(stream(earlier)) for earlier in range(max(round - self.away, 1), round)):
            fault.absent = True
        now = stream(round)
        if not self.triggers(now):
            return
        if self.when == "before":
            fault.silent = True
        elif self.when == "during":
            fault.arrives = min(fault.arrives, float(now.random()))


class Straggle(ByChance):
    """Slow client; past `federation.deadline` its upload is rejected as late.

    The computing time is simulated, not measured, and the transfer time of the client's link is added to it, so that a
    run gives the same result on any machine.

    Args:
        chance: probability per client and round, in [0, 1].
        seconds: simulated computing time, > 0.
        clients: ids of the clients that it may affect; None: all.
    """

    name = "straggler"

    def __init__(self, chance: float, seconds: float, clients: list[int] | None = None):
        super().__init__(chance, clients)
        if not 0 < seconds < math.inf:
            raise UserError(f"seconds must be > 0, got {seconds}")
        self.seconds = seconds

    def apply(self, fault: ClientFault, round: int, stream: Stream) -> None:
        """Add the computing time."""
        if self.triggers(stream(round)):
            fault.seconds += self.seconds


class NotFinite(ByChance):
    """Upload with every real number replaced by NaN.

    Args:
        chance: probability per client and round, in [0, 1].
        clients: ids of the clients that it may affect; None: all.
    """

    name = "nan_upload"

    def apply(self, fault: ClientFault, round: int, stream: Stream) -> None:
        """Mark the upload as not finite."""
        if self.triggers(stream(round)):
            fault.finite = False


class LateJoin(Fault):
    """Clients that join the federation after the first round.

    Args:
        clients: ids of the clients.
        round: the first round in which they can be sampled, ≥ 1.
    """

    name = "late_join"

    def __init__(self, clients: list[int], round: int):
        super().__init__(clients)
        if round < 1:
            raise UserError(f"round must be at least 1, got {round}")
        self.round = round

    def apply(self, fault: ClientFault, round: int, stream: Stream) -> None:
        """Mark the client absent before its first round."""
        fault.absent |= round < self.round
