"""Stop of a run whose privacy budget is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fdl.callbacks.base import Callback

if TYPE_CHECKING:
    from fdl.federation.state import Federation


class StopWhenSpent(Callback):
    """Ends a run after the round in which somebody's budget did not suffice."""

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Look for clients, or a server, that had to leave something out."""
        spent = [f"client {client}" for client, own in record["clients"].items() if own.get("privacy/exhausted")]
        spent += ["the server"] if record["metrics"].get("privacy/exhausted") else []
        if spent:
            loop.stop(f"the privacy budget of {', '.join(spent)} is spent")
