"""Costs of a round in its record: traffic, codecs chosen, privacy spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdl.comm.ledger import Ledger


def add_costs(record: dict[str, Any], ledger: Ledger, history: Sequence[dict[str, Any]]) -> None:
    """Add the costs of a round to its record.

    Args:
        record: the round's record. Gets ``communication``, bytes and simulated seconds of transfer since the run began;
            ``codings``, if links with a bandwidth budget used a cheaper codec: the codec and the fraction of rows sent,
            by direction and client; and ``privacy``, if it is accounted for: the ε spent since the run began, by
            client, the largest of which becomes the metric ``privacy/epsilon``.
        ledger: the bytes of every message.
        history: the records of all earlier rounds.
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
