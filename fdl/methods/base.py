"""Base class of federated algorithms: five short methods and no state of their own."""

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
        name: short name in recipes.
        tasks: kinds of data that the method supports, among `fdl.metrics.tasks.TASKS`; empty for methods that use
            nothing but weights and a module's own loss, which support all.
        sends: types of the messages that `local_update` may return, alone or in a bundle; ``()`` if clients send
            nothing. Uploads of another type are an error. None, the default, allows any; then no adversary that changes
            uploads can be checked against the method.
        confidence: measure of a client's knowledge of each proxy sample, used by attacks on confidences; None if
            clients send no confidence.
        requires: parts of a recipe that the method needs, among student, specialists, proxy, public, teacher and
            pooled; a constructor may add to it. Clients of a method without specialists have the student's
            architecture.
        uploads_are_deltas: True if clients upload differences from the downloaded parameters.
        needs_calibration: True if clients read private samples that are held out from training
            (`Client.calibration`). For other methods, a recipe without `federation.calibration_fraction` holds none
            out.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = ()
    sends: ClassVar[tuple[type[Message], ...] | None] = None
    uploads_are_deltas: ClassVar[bool] = False
    needs_calibration: bool = False
    confidence: Confidence | TokenConfidence | None = None
    requires: tuple[str, ...] = ("student",)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Prepare the server's state before the first round.

        Args:
            server: the server, whose `state` is to be filled.
            clients: all clients, whose number and settings may be read, but not their data.
        """

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Return the bytes that each client receives before the first round, by kind, e.g. of the proxy set.

        Args:
            server: the server, which holds the public data.
        """
        return {}

    def download(self, server: Server, client: int) -> Message | None:
        """Return the server's message to a client at the start of a round.

        Clients that receive the same message should get the same object (`Server.cached_download`), which is then
        encoded once.

        Args:
            server: the server.
            client: id of the recipient.

        Returns:
            The message, or None if nothing is sent.
        """
        return None

    @abstractmethod
    def local_update(self, client: Client, download: Message | None) -> Message | Requests[Message | None] | None:
        """Do one client's work of a round, and return its upload.

        Args:
            client: the client, with its data, models and state.
            download: message received from the server; None if there was none.

        Returns:
            The upload, or None if nothing is sent. A generator that yields requests (`fdl.engine.requests`) and returns
            the upload lets executors compute the requests of several clients in one pass.
        """

    def aggregate(self, server: Server) -> Aggregate | None:
        """Return an empty aggregate for one round; None for a method whose clients send nothing.

        Args:
            server: the server.
        """
        return None

    def student_extra_state(self, server: Server) -> dict[str, Any]:
        """Return the part of the server's state that belongs to the student besides its weights; empty by default.

        Args:
            server: the server.
        """
        return {}

    def on_restore(self, server: Server) -> None:
        """Bring the student in line with the server's state after the state was restored from a checkpoint.

        Args:
            server: the server.
        """

    def server_models(self, server: Server) -> Iterable[tuple[str, LightningModule]]:
        """Yield the names and models that the server evaluates besides its student.

        A yielded model may be used only until the next one is requested, since they may share a module.

        Args:
            server: the server.
        """
        return ()

    def client_model(self, server: Server, client: Client) -> nn.Module:
        """Return the model that is evaluated as a client's, for clients with a specialist.

        Args:
            server: the server.
            client: the client, within its turn.
        """
        return client.specialist()

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Update the server from the aggregate's result.

        Args:
            server: the server.
            knowledge: the result of the round's aggregate; None for a method without one.

        Returns:
            Numbers to log, by name.
        """
        return {}
