"""Costs of a round in its record: traffic, codecs chosen, privacy spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdl.comm.ledger import Ledger


def add_costs(record: dict[str, Any], ledger: Ledger, history: Sequence[dict[str, Any]]) -> None:
    """Add what a round cost to its record.

    Args:
        record: of the round. Gets ``communication``, bytes and simulated seconds of transfer since the run began;
            ``codings``, where a link with a budget got a cheaper codec: the codec and the share of rows sent, by
            direction and client; and ``privacy``, where that is accounted for: the ε spent since the run began, by
            client; the largest becomes the metric ``privacy/epsilon``.
        ledger: counts of every message.
        history: the records of all rounds before.
    """
    round = record["round"]
    before = history[-1]["communication"]["transfer_s"] if history else ledger.transfer_seconds(0)
    record["communication"] = {**ledger.totals(), "transfer_s": before + ledger.transfer_seconds(round)}
    if chosen := [note for note in ledger.notes if note.round == round]:
        record["codings"] = {f"{note.direction}/{note.client}": [note.coding, note.share] for note in chosen}
    spent = {
        client: own["privacy/epsilon"] for client, own in record.get("clients", {}).items() if "privacy/epsilon" in own
    }
    if spent := {**(history[-1].get("privacy", {}) if history else {}), **spent}:
        record["privacy"] = spent
        record["metrics"].setdefault("privacy/epsilon", max(spent.values()))
