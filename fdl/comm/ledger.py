"""Ledger of bytes per round, client, direction and kind of message."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from fdl.comm.bandwidth import Link

Cells = dict[tuple[int, int], list[int]]
"""Bytes and messages of one round by client and route."""

DIRECTIONS = {"up": "upload_bytes", "down": "download_bytes", "setup": "setup_bytes"}


_UNPACKED = 1000
"""Rows of past rounds that are not deflated yet: doing so for a few small rounds at a time costs half."""


class LedgerEntry(NamedTuple):
    """Traffic between the server and one client in one round, in one direction and of one kind.

    Setup costs are rows of round 0 and direction ``"setup"``.
    """

    round: int
    client: int
    direction: str
    kind: str
    bytes: int
    messages: int


class RejectedMessage(NamedTuple):
    """A message that the receiver did not use; its bytes are counted all the same."""

    round: int
    client: int
    reason: str


class CodecChoice(NamedTuple):
    """Codec choice for a message that was too large for its link with the recipe's chain."""

    round: int
    client: int
    direction: str
    coding: str
    share: float


class Ledger:
    """Counts bytes by round, client, direction and kind.

    Every row is kept. All but the last rounds are held deflated, at a few bytes a row, so that
    thousands of clients over hundreds of rounds stay small in memory and in a checkpoint; sums are kept as they grow.

    Attributes:
        refusals: in the order in which they happened.
        notes: of messages that were coded more cheaply than the recipe says, likewise.
        links: gives the link of a client (its id) in a direction, for the time that transfers take; None when no link
            takes any.
    """

    def __init__(self) -> None:
        self.refusals: list[RejectedMessage] = []
        self.notes: list[CodecChoice] = []
        self.links: Callable[[int, str], Link] | None = None
        self._routes: list[tuple[str, str]] = []  # (direction, kind), in order of their first appearance
        self._open_round: int | None = None
        self._open: Cells = {}
        self._past: dict[int, Cells] = {}
        self._closed: dict[int, str] = {}
        self._by_route: list[int] = []
        self._by_client: dict[int, dict[str, int]] = {}

    def add(self, round: int, client: int, direction: str, kind: str, nbytes: int, messages: int = 1) -> None:
        """Count a message, or several.

        Args:
            round: the round, 0 for setup costs.
            client: id of the client that sent or received it.
            direction: ``"up"``, ``"down"`` or ``"setup"``.
            kind: what it was, e.g. ``"responses"``.
            nbytes: bytes on the wire.
            messages: how many they are.
        """
        if round != self._open_round:
            self._turn_to(round)
        route = self._route(direction, kind)
        cell = self._open.setdefault((client, route), [0, 0])
        cell[0] += nbytes
        cell[1] += messages
        self._sum(client, route, nbytes)

    def reject(self, round: int, client: int, reason: str) -> None:
        """Note that a client's message was not used; long reasons are cut."""
        self.refusals.append(RejectedMessage(round, client, reason[:300]))

    def note(self, round: int, client: int, direction: str, coding: str, share: float = 1.0) -> None:
        """Note that a message was coded otherwise than the recipe says.

        Args:
            round: the round.
            client: id of the client that sent or received it.
            direction: ``"up"`` or ``"down"``.
            coding: the chain that it was coded with.
            share: of its rows that were sent.
        """
        self.notes.append(CodecChoice(round, client, direction, coding, share))

    def of_round(self, round: int) -> list[LedgerEntry]:
        """Return the rows of one round, as in `rows`."""
        return self._rows_of(round, self._cells(round))

    def include(
        self, rows: Iterable[LedgerEntry], refusals: Iterable[RejectedMessage] = (), notes: Iterable[CodecChoice] = ()
    ) -> None:
        """Take in what another process counted, of clients that this one has not counted in these rounds."""
        for row in rows:
            self.add(*row)
        self.refusals += refusals
        self.notes += notes

    def transfer_seconds(self, round: int) -> float:
        """Return how long the transfers of a round take over the clients' links, 0 for the setup.

        Every message takes latency + 8·bytes/rate. A client's messages come one after the other, and clients do not
        wait for each other, so this is the time of the slowest client.
        """
        if self.links is None:
            return 0.0
        seconds: dict[int, float] = {}
        for (client, route), (nbytes, messages) in self._cells(round).items():
            time = self.links(client, self._routes[route][0]).seconds(nbytes, messages)
            seconds[client] = seconds.get(client, 0.0) + time
        return max(seconds.values(), default=0.0)

    def rows(self) -> list[LedgerEntry]:
        """Return every row, by round, then client, then in order of the first message of that direction and kind."""
        rows = [self._rows_of(round, self._cells(round)) for round in (*self._closed, *self._past, self._open_round)]
        return sorted((row for some in rows for row in some), key=lambda row: row[:2])

    def totals(self) -> dict[str, int]:
        """Return bytes so far: ``upload_bytes``, ``download_bytes`` and ``setup_bytes``."""
        totals = dict.fromkeys(DIRECTIONS.values(), 0)
        for (direction, _), nbytes in zip(self._routes, self._by_route):
            totals[DIRECTIONS[direction]] += nbytes
        return totals

    def by_kind(self) -> dict[str, int]:
        """Return bytes so far by direction and kind, e.g. ``{"up/responses": 120}``."""
        return {f"{direction}/{kind}": nbytes for (direction, kind), nbytes in zip(self._routes, self._by_route)}

    def by_client(self) -> dict[int, dict[str, int]]:
        """Return bytes so far of every client by direction, e.g. ``{0: {"up": 120, "down": 0, "setup": 0}}``."""
        return {client: dict(self._by_client[client]) for client in sorted(self._by_client)}

    def state_dict(self) -> dict:
        """Return numbers, strings and lists only, fit for JSON."""
        recent = self._past | ({self._open_round: self._open} if self._open else {})
        rounds = self._closed | {round: _pack(cells) for round, cells in recent.items()}
        return {
            "routes": [list(route) for route in self._routes],
            "rounds": [[round, rounds[round]] for round in sorted(rounds)],
            "refusals": [list(refusal) for refusal in self.refusals],
            "notes": [list(note) for note in self.notes],
        }

    def load_state_dict(self, state: dict) -> None:
        """Become the ledger that gave this state."""
        links = self.links
        self.__init__()
        self.links = links
        self._routes = [tuple(route) for route in state["routes"]]
        self._by_route = [0] * len(self._routes)
        self._closed = dict(state["rounds"])
        self.refusals = [RejectedMessage(*refusal) for refusal in state["refusals"]]
        self.notes = [CodecChoice(*note) for note in state.get("notes", ())]
        for packed in self._closed.values():
            for (client, route), (nbytes, _) in _unpack(packed).items():
                self._sum(client, route, nbytes)

    def _route(self, direction: str, kind: str) -> int:
        route = (direction, kind)
        if route not in self._routes:
            if direction not in DIRECTIONS:
                raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
            self._routes.append(route)
            self._by_route.append(0)
        return self._routes.index(route)

    def _sum(self, client: int, route: int, nbytes: int) -> None:
        self._by_route[route] += nbytes
        if client not in self._by_client:
            self._by_client[client] = dict.fromkeys(DIRECTIONS, 0)
        self._by_client[client][self._routes[route][0]] += nbytes

    def _rows_of(self, round: int, cells: Cells) -> list[LedgerEntry]:
        return [
            LedgerEntry(round, client, *self._routes[route], *cell) for (client, route), cell in sorted(cells.items())
        ]

    def _cells(self, round: int | None) -> Cells:
        """Return the content of a round, for reading."""
        if round == self._open_round:
            return self._open
        return _unpack(self._closed[round]) if round in self._closed else self._past.get(round, {})

    def _turn_to(self, round: int) -> None:
        """Make a round the one that is written to; a past one is taken up again."""
        if self._open:
            self._past[self._open_round] = self._open
        packed = self._closed.pop(round, None)
        self._open_round, self._open = round, self._past.pop(round, {}) if packed is None else _unpack(packed)
        if sum(map(len, self._past.values())) > _UNPACKED:
            self._closed |= {past: _pack(cells) for past, cells in self._past.items()}
            self._past = {}


def _pack(cells: Cells) -> str:
    columns = np.array([(*key, *cell) for key, cell in sorted(cells.items())], "<i8").T
    columns[0, 1:] = np.diff(columns[0])  # clients rise, so their differences deflate to next to nothing
    return base64.b85encode(zlib.compress(columns.tobytes(), 1)).decode()


def _unpack(packed: str) -> Cells:
    columns = np.frombuffer(zlib.decompress(base64.b85decode(packed)), "<i8").reshape(4, -1)
    clients, routes, nbytes, messages = np.cumsum(columns[0]).tolist(), *columns[1:].tolist()
    return {(client, route): [n, m] for client, route, n, m in zip(clients, routes, nbytes, messages)}
