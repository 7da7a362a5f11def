"""Local training without communication, the lower bound of federated methods."""

from __future__ import annotations

from fdl.engine.requests import FitRequest, Requests
from fdl.messages import Message
from fdl.methods.base import Method
from fdl.participants import Client


class SingleSite(Method):
    """Lower bound: each client trains its specialist on its own data, without communication."""

    name = "single_site"
    sends = ()
    requires = ("specialists",)

    def local_update(self, client: Client, download: Message | None) -> Requests[Message | None]:
        """Continue to train the specialist, and return None: nothing is sent."""
        specialist = client.specialist()
        yield FitRequest(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        return None
