"""Interface of what a round's uploads are combined by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fdl.messages import Message


class Aggregate(Protocol):
    """Sums uploads as they arrive, so that memory does not grow with the number of clients.

    With several processes every one of them adds all uploads, in the cohort's order. An aggregate of large messages
    may have a method `reduce(ranks)`, too: then each process adds what its own clients sent, and `reduce` takes in
    what the others have.
    """

    def add(self, message: Message, client: int) -> None:
        """Take in one upload.

        Raises:
            RefusedError: when it does not fit, before anything is changed.
        """

    def result(self) -> Any:
        """What was learnt from all uploads together; None when there was none."""


class MergeableAggregate(Aggregate, Protocol):
    """An aggregate that can take in what another of its kind has taken in."""

    def merge(self, other: Any) -> None:
        """Take in another aggregate's uploads.

        Args:
            other: of the same kind, over other uploads.
        """
