"""What a round cost, written into its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdl.comm.ledger import Ledger


def account(ledger: Ledger, record: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
    """Add the traffic until the end of a round to its record.

    Args:
        ledger: where every message was counted.
        record: of the round. Gets ``communication``: bytes and seconds on the links, were they real, since the run
            began; and ``codings``, where a narrow link made the channel choose a cheaper coding: by direction and
            client, the coding and the share of the rows that was sent; and ``privacy``, where that is accounted for: by
        client, the ε it has spent since the run began, of which the largest is a metric, too.
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
