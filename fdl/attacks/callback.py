"""Callback that runs the attacks of a recipe at the end of a run; the loop itself knows of no attacks."""

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
    """Attacks the finished run and adds the results to its summary.

    It is called before all other callbacks, so that they see the results, and on every rank, since the ranks share the
    work.

    Args:
        attacks: the attacks, with different labels.
    """

    name: ClassVar[str] = "audit"

    def __init__(self, attacks: Sequence[Attack]):
        self.attacks = attacks

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Attack the run, then save its summary again, with the results and the time they took."""
        self.run(loop)
        summary.update(summarise(loop))
        loop.on_summary(summary)

    def run(self, loop: Federation) -> Audit:
        """Attack a run after its last round, store the results in its attribute `audit`, and return them.

        Args:
            loop: the run.
        """
        with loop.seconds("audit"):
            loop.audit = found = audit(loop, self.attacks)
        return found
