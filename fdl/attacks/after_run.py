"""Attacks at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdl.attacks.base import Attack
    from fdl.loop import FederatedLoop


def attack(loop: FederatedLoop, attacks: Sequence[Attack]) -> None:
    """Try attacks on the finished run, and keep what they find as its `audit`.

    Args:
        loop: after its last round.
        attacks: with different labels.
    """
    from fdl.attacks.audit import audit  # its shadow federations are loops themselves

    with loop.seconds("audit"):
        loop.audit = audit(loop, attacks)
