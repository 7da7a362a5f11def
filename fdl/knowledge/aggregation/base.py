"""Base class of aggregates, which combine the uploads of a round."""

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
        reduces: True if the class implements `reduce`. Without it every process adds all uploads, in the cohort's
            order, so that nothing has to be written for several processes; with it each process adds the uploads of its
            own clients only, and large messages do not travel.
    """

    reduces: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note whether the class implements `reduce`."""
        super().__init_subclass__(**kwargs)
        cls.reduces = cls.reduce is not Aggregate.reduce

    @abstractmethod
    def add(self, message: Any, client: int) -> None:
        """Add one upload.

        Args:
            message: the received upload: a message or bundle of the types in `Method.sends`, valid in itself.
            client: id of the sender.

        Raises:
            RejectedMessageError: the message does not fit; the aggregate is unchanged.
        """

    @abstractmethod
    def result(self) -> Any:
        """Return the input of `Method.server_update`, or None if no upload could be used."""

    def merge(self, other: Self) -> None:
        """Add the uploads of another aggregate.

        Args:
            other: an aggregate of the same kind and settings, over other uploads.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot take in another aggregate")

    def reduce(self, ranks: ProcessGroup) -> None:
        """Combine this aggregate with its counterparts on all other ranks; a collective call.

        Args:
            ranks: the processes; `sum` and `max_` combine a tensor over them in place.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be reduced over processes")
