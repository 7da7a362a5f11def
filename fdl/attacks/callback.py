"""Attacks at the end of a run, as a callback: the loop knows of none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fdl.attacks.audit import Audit, audit
from fdl.callbacks.base import Callback
from fdl.federation.summary import summarise

if TYPE_CHECKING:
    from fdl.attacks.base import Attack
    from fdl.federation.state import Federation


class AuditCallback(Callback):
    """Attacks the finished run and adds the findings to its summary.

    It stands before all other callbacks, so that they see the findings, and on every rank, since the ranks share the
    work.

    Args:
        attacks: with different labels.
    """

    name: ClassVar[str] = "audit"

    def __init__(self, attacks: Sequence[Attack]):
        self.attacks = attacks

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Attack the run; its summary, with the findings and the time that they took, is saved once more."""
        self.run(loop)
        summary.update(summarise(loop))
        loop.on_summary(summary)

    def run(self, loop: Federation) -> Audit:
        """Attack a run after its last round, keep the findings as its `audit`, and return them."""
        with loop.seconds("audit"):
            loop.audit = found = audit(loop, self.attacks)
        return found
