"""Centralised training, the upper bound of federated methods."""

from __future__ import annotations

from typing import Any

from fdl.messages import Message
from fdl.methods.base import Method
from fdl.participants import Client, Server


class Centralized(Method):
    """Upper bound: train the student on all private data pooled in one place.

    Each round trains with the recipe's `local_training` settings on the union of the clients' training samples: samples
    that they hold out for calibration (`federation.calibration_fraction`) are held out here, too. Nothing is sent.
    """

    name = "centralized"
    sends = ()
    requires = ("student", "pooled")

    def local_update(self, client: Client, download: Message | None) -> Message | None:
        """Return None: clients have nothing to do."""
        return None

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Train the student on the pooled data."""
        server.fit(server.student, server.pooled, server.local_training)
        return {}
