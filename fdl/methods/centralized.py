"""The ceiling: all private data in one place."""

from __future__ import annotations

from typing import Any

from fdl.messages import Message
from fdl.methods.base import Method
from fdl.participants import Client, Server


class Centralized(Method):
    """Train the student on all private data pooled: what nobody may do, and everybody is measured against.

    Each round trains for the recipe's `local_training` settings on the union of what the clients train on: samples that
    they hold out to calibrate (`federation.calibration_fraction`) are held out here, too. Nothing crosses the wire,
    since there is no wire.
    """

    name = "centralized"
    sends = ()
    requires = ("student", "pooled")

    def local_update(self, client: Client, download: Message | None) -> Message | None:
        """Clients have nothing to do."""
        return None

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Train the student on the pooled data."""
        server.fit(server.student, server.pooled, server.local_training)
        return {}
