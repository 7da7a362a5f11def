"""One client's part in a round: `Method.local_update`, run from request to request."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from fdl.engine.requests import FitRequest, PredictRequest, Requests
from fdl.errors import UserError, out_of_memory

if TYPE_CHECKING:
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client


class LocalTurn:
    """A local update that stops wherever it yields a request, until it is resumed with the result.

    Where `local_update` is a plain function, which computes at once whatever it needs, it is over when it has started.

    Args:
        method: whose `local_update` runs.
        client: whose turn it is.
        download: what the client was sent.

    Attributes:
        request: the request whose result it waits for; None before it starts and when it is over.
        upload: what the client sends, once it is over.
    """

    def __init__(self, method: Method, client: Client, download: Message | None):
        self.method, self.client, self.download = method, client, download
        self.request: FitRequest | PredictRequest | None = None
        self.upload: Message | None = None
        self._requests: Requests[Message | None] | None = None
        self._client_turn = ExitStack()  # within it the client may borrow modules

    @property
    def is_generator(self) -> bool:
        """True if the local update yields requests; known once it has started."""
        return self._requests is not None

    def start(self) -> None:
        """Run to the first request, or to the end."""
        self._client_turn.enter_context(self.client.turn())
        try:
            update = self.method.local_update(self.client, self.download)
            if not isinstance(update, Generator):
                self.upload = update
        except BaseException:
            self._client_turn.close()
            raise
        if isinstance(update, Generator):
            self._requests = update
            self._advance(update.send, None)
        else:
            self._client_turn.close()

    def resume(self, result: Any) -> None:
        """Run from a request to the next one, or to the end.

        Args:
            result: of the request.
        """
        self._advance(self._requests.send, result)

    def run_request(self) -> None:
        """Compute what it waits for, for this client alone, and resume it.

        An error is raised where the local update yielded the request, so that it can handle it.
        """
        try:
            result = self.client.run(self.request)
        except Exception as error:
            self._advance(self._requests.throw, error)
        else:
            self.resume(result)

    def cancel(self) -> None:
        """End it wherever it is; its ``finally`` blocks run."""
        self.request = None
        with self._client_turn:
            if self._requests is not None:
                self._requests.close()

    def _advance(self, step: Callable[[Any], Any], value: Any) -> None:
        self.request = None
        try:
            self.request = self._next_request(step, value)
        finally:
            if self.request is None:
                self._client_turn.close()

    def _next_request(self, step: Callable[[Any], Any], value: Any) -> FitRequest | PredictRequest | None:
        """Let the generator run; None when it has returned."""
        try:
            request = step(value)
        except StopIteration as end:
            if isinstance(end.value, Generator):
                raise UserError(
                    f"{self._name} returns a generator; where it calls another one that yields requests, write "
                    "`return (yield from …)`"
                ) from None
            self.upload = end.value
            return None
        if not isinstance(request, FitRequest | PredictRequest):
            raise UserError(
                f"{self._name} yields {type(request).__name__}, not a FitRequest or PredictRequest; client.fit(…) and "
                "client.predict(…) compute at once and need no yield"
            )
        return request

    @property
    def _name(self) -> str:
        return f"{type(self.method).__qualname__}.local_update"


def run_local_update(method: Method, client: Client, download: Message | None) -> Message | None:
    """Run a client's local update to its end, every request at once.

    Args:
        method: whose `local_update` runs.
        client: whose turn it is, with its random streams as they are.
        download: what the client was sent.

    Returns:
        What the client sends to the server.
    """
    turn = LocalTurn(method, client, download)
    try:
        turn.start()
        while turn.request is not None:
            turn.run_request()
    finally:
        turn.cancel()
    return turn.upload


def raise_for_client(error: Exception, clients: Sequence[Client]) -> NoReturn:
    """Raise an error of a local update, so that it names its clients.

    Args:
        error: what was raised.
        clients: one, or those that were trained in one pass.

    Raises:
        UserError: for a user's mistake and where memory is exhausted; anything else as it is, with a note.
    """
    first = clients[0]
    who = f"client {first.id}" if len(clients) == 1 else "clients " + ", ".join(str(client.id) for client in clients)
    who += f" ({first.architecture}) in round {first.round}"
    if isinstance(error, UserError):
        raise UserError(f"{who}: {error}") from error
    hint = "local_training.batch_size or evaluation.batch_size, or give it a smaller model"
    if (known := out_of_memory(error, who, hint)) is not None:
        raise known from error
    if sys.version_info >= (3, 11):
        error.add_note(f"while {who} took its turn")
    raise error
