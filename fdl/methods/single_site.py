"""The floor: every institution alone."""

from __future__ import annotations

from fdl.engine.requests import FitRequest, Requests
from fdl.messages import Message
from fdl.methods.base import Method
from fdl.participants import Client


class SingleSite(Method):
    """Every client trains its specialist on its own data and tells nobody."""

    name = "single_site"
    sends = ()
    requires = ("specialists",)

    def local_update(self, client: Client, download: Message | None) -> Requests[Message | None]:
        """Train the specialist further."""
        specialist = client.specialist()
        yield FitRequest(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        return None
