"""What a federated algorithm is: five short functions and no state of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import nn

    from fdl.engine.requests import Requests
    from fdl.knowledge.aggregation.base import Aggregate
    from fdl.knowledge.confidence.base import Confidence
    from fdl.knowledge.confidence.tokens import TokenConfidence
    from fdl.messages import Message
    from fdl.participants import Client, Server


class Method(ABC):
    """A federated algorithm; holds configuration only, all state lives in the participants.

    `local_update` sees one client and one message, never the server or another client: the same code must be able to
    run in another process, on another site.

    Attributes:
        name: the short name in recipes.
        tasks: the kinds of data that it is for, among `fdl.metrics.tasks.TASKS`; empty where it is for any, as are
            methods that touch nothing but weights and a module's own loss.
        sends: types of the messages that `local_update` may return, alone or in a bundle; ``()`` where clients send
            nothing. Uploads of another type are an error. None, of a method that does not declare it, allows any; then
            no adversary that changes uploads can be checked against it.
        confidence: how clients measure what they know of each proxy sample, None where they send no such thing; it is
            what attacks on confidences ask.
        requires: the parts of a recipe that it needs, among student, specialists, proxy, public, teacher and pooled; a
            constructor may add to it. Clients of a method without specialists have the student's architecture.
        uploads_are_deltas: whether the parameters that clients send are differences from those that they were sent.
        needs_calibration: whether its clients look at private samples that are held out from training,
            `Client.calibration`; a recipe that does not say how many holds none out for a method that does not.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = ()
    sends: ClassVar[tuple[type[Message], ...] | None] = None
    uploads_are_deltas: ClassVar[bool] = False
    needs_calibration: bool = False
    confidence: Confidence | TokenConfidence | None = None
    requires: tuple[str, ...] = ("student",)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Prepare the server's state before the first round; clients are given for counting, not for reading."""

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """What every client must be sent before the first round, in bytes by kind, e.g. the proxy set."""
        return {}

    def download(self, server: Server, client: int) -> Message | None:
        """What the server sends to a client at the start of a round; the same object for all where it is the same."""
        return None

    @abstractmethod
    def local_update(self, client: Client, download: Message | None) -> Message | Requests[Message | None] | None:
        """One client's work in a round, and what it sends to the server."""

    def aggregate(self, server: Server) -> Aggregate | None:
        """An empty aggregate for one round; None for a method whose clients send nothing."""
        return None

    def student_extra_state(self, server: Server) -> dict[str, Any]:
        """The part of the server's state that its student is made of beside its own weights; most have none."""
        return {}

    def on_restore(self, server: Server) -> None:
        """Bring the student in line with the server's state, which has just been read from a file."""

    def server_models(self, server: Server) -> Iterable[tuple[str, LightningModule]]:
        """Models of the server beside its student, by name, that are to be evaluated too.

        A model that is yielded is the caller's only until the next one is asked for: they may share a template.
        """
        return ()

    def client_model(self, server: Server, client: Client) -> nn.Module:
        """The model that answers for a client that has a specialist, when specialists are evaluated."""
        return client.specialist()

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Learn from the aggregate; returns what is worth logging."""
        return {}
