"""Attacks at the end of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop


def attack(loop: FederatedLoop) -> None:
    """Try the recipe's attacks on the finished run, and keep what they find as its `audit`."""
    from fdl.attacks.audit import audit  # its shadow federations are loops themselves

    with loop.seconds("audit"):
        loop.audit = audit(loop, loop.attacks)
