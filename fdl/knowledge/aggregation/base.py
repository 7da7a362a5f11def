"""Base class of what a round's uploads are combined by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

    from fdl.engine.distributed.process_group import ProcessGroup


class Aggregate(ABC):
    """Uploads of one round, combined as they arrive, so that memory need not grow with the number of clients.

    `Method.aggregate` makes an empty one for each round; a subclass writes `add` and `result`. `WeightedMean` is ready
    for any `TensorMessage`, `ParameterMean` for weights, `ResponseMean` for responses to the proxy set.

    Attributes:
        reduces: whether `reduce` is there. Without it every process adds all uploads, in the cohort's order, so that
            nothing has to be written for several processes; with it each adds what its own clients sent, and large
            messages do not travel.
    """

    reduces: ClassVar[bool] = False

    @abstractmethod
    def add(self, message: Any, client: int) -> None:
        """Take in one upload.

        Args:
            message: what the server received: a message or bundle of the types in `Method.sends`, valid in itself.
            client: id of the sender.

        Raises:
            RejectedMessageError: the message does not fit; the aggregate is as it was.
        """

    @abstractmethod
    def result(self) -> Any:
        """Return what `Method.server_update` learns from, or None where no upload could be used."""

    def merge(self, other: Self) -> None:
        """Take in what another aggregate took in.

        Args:
            other: of the same kind and settings, over other uploads.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot take in another aggregate")

    def reduce(self, ranks: ProcessGroup) -> None:
        """Take in what the same aggregate took in on all other ranks; all ranks call this together.

        Args:
            ranks: the processes; `sum` and `largest` combine a tensor over them in place.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be reduced over processes")
