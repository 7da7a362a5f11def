"""Callback that ends a run once a privacy budget is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fdl.callbacks.base import Callback

if TYPE_CHECKING:
    from fdl.federation.state import Federation


class StopWhenSpent(Callback):
    """Ends a run after the first round in which a participant's privacy budget did not suffice."""

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Stop the loop if a client or the server had to skip an operation for lack of budget."""
        spent = [f"client {client}" for client, own in record["clients"].items() if own.get("privacy/exhausted")]
        spent += ["the server"] if record["metrics"].get("privacy/exhausted") else []
        if spent:
            loop.stop(f"the privacy budget of {', '.join(spent)} is spent")
