"""Bandwidth and latency of the clients' links."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fdl.errors import UserError


class Link(NamedTuple):
    """One direction of one client's connection.

    Attributes:
        bytes_per_round: most bytes of messages in a round.
        bits_per_second: its rate.
        latency: seconds until a message begins to arrive.
    """

    bytes_per_round: float = math.inf
    bits_per_second: float = math.inf
    latency: float = 0.0

    def seconds(self, nbytes: int, messages: int = 1) -> float:
        """Return how long messages of so many bytes together take: latency + 8·bytes/rate, one after the other.

        Example:
            >>> round(Link(bits_per_second=10e6, latency=0.05).seconds(1_000_000), 2)
            0.85
        """
        return messages * self.latency + 8 * nbytes / self.bits_per_second


UNLIMITED = Link()

#: What the names in a recipe stand for. Moderate: a hospital's shared line, 10 Mbit/s with 50 ms latency and 8 s a
#: round to send in. Severe: a satellite or cellular link, 128 kbit/s with 600 ms latency and 8 s a round.
SCENARIOS: dict[str, dict[str, float]] = {
    "unlimited": {},
    "moderate": {"bits_per_second": 10e6, "seconds_per_round": 8.0, "latency": 0.05},
    "severe": {"bits_per_second": 128e3, "seconds_per_round": 8.0, "latency": 0.6},
}

_FIGURES = ("bytes_per_round", "bits_per_second", "seconds_per_round", "latency")
_DIRECTIONS = {"upload": "up", "download": "down"}


class Bandwidth:
    """The links of all clients.

    A link is a scenario's name or figures: ``bytes_per_round``, or ``bits_per_second``, ``seconds_per_round`` and
    ``latency``, of which a budget of (seconds_per_round − latency)·bits_per_second/8 bytes follows. A mapping of
    ``upload`` and ``download`` gives each direction its own. What is not said is unlimited.

    Args:
        common: the link of every client without one of its own.
        clients: links by client id.

    Raises:
        UserError: a link makes no sense; the message begins with its key below ``channel``.
    """

    def __init__(self, common: Any = "unlimited", clients: Mapping[int | str, Any] | None = None):
        self._common = _links(common, "bandwidth")
        if clients is not None and not isinstance(clients, Mapping):
            raise UserError(f"clients: expected a mapping of client ids to links, got {clients!r}")
        self._clients = {}
        for client, link in (clients or {}).items():
            if not str(client).isdecimal():
                raise UserError(f"clients.{client}: expected the id of a client, a number from 0")
            self._clients[int(client)] = _links(link, f"clients.{client}")

    @property
    def clients(self) -> list[int]:
        """The ids of the clients that have a link of their own."""
        return sorted(self._clients)

    def link(self, client: int, direction: str) -> Link:
        """Return a client's link.

        Args:
            client: its id.
            direction: ``"up"`` or ``"down"``; ``"setup"`` comes down.
        """
        return self._clients.get(client, self._common)["down" if direction == "setup" else direction]

    @property
    def timed(self) -> bool:
        """Return True if transfers over any link take simulated time."""
        return any(
            link.seconds(1, 1) > 0 for links in (self._common, *self._clients.values()) for link in links.values()
        )

    def limited(self, direction: str) -> bool:
        """Tell whether any client has a budget in a direction."""
        return any(links[direction].bytes_per_round < math.inf for links in (self._common, *self._clients.values()))


def _links(value: Any, key: str) -> dict[str, Link]:
    if isinstance(value, Mapping) and value and value.keys() <= _DIRECTIONS.keys():
        return {
            short: _link(value[name], f"{key}.{name}") if name in value else UNLIMITED
            for name, short in _DIRECTIONS.items()
        }
    return dict.fromkeys(_DIRECTIONS.values(), _link(value, key))


def _link(value: Any, key: str) -> Link:
    if isinstance(value, str) and value in SCENARIOS:
        value = SCENARIOS[value]
    if not isinstance(value, Mapping) or not value.keys() <= set(_FIGURES):
        raise UserError(
            f"{key}: expected {', '.join(SCENARIOS)}, or figures among {', '.join(_FIGURES)}, "
            f"or a mapping of upload and download; got {value!r}"
        )
    for name, figure in value.items():
        number = isinstance(figure, int | float) and not isinstance(figure, bool)
        if not number or not (0 <= figure < math.inf if name == "latency" else 0 < figure < math.inf):
            raise UserError(f"{key}.{name}: expected a number {'≥' if name == 'latency' else '>'} 0, got {figure!r}")
    rate, latency = value.get("bits_per_second", math.inf), value.get("latency", 0.0)
    budget = value.get("bytes_per_round", math.inf)
    if "seconds_per_round" in value:
        if "bits_per_second" not in value:
            raise UserError(f"{key}.bits_per_second: missing: seconds_per_round says nothing without a rate")
        budget = min(budget, math.floor((value["seconds_per_round"] - latency) * rate / 8))
        if budget < 1:
            raise UserError(f"{key}.seconds_per_round: {value['seconds_per_round']} s leave no time to send a byte")
    return Link(float(budget), float(rate), float(latency))
