"""How the clients of a round take their turns."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

from fdl.errors import UserError, out_of_memory
from fdl.runtime import seed_everything

if TYPE_CHECKING:
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client


class Executor(ABC):
    """Runs `Method.local_update` for a cohort.

    Results must not depend on the order of turns: each turn begins with the client's own streams and its own state.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(
        self, method: Method, turns: Iterable[tuple[Client, Message | None]]
    ) -> Iterator[tuple[Client, Message | None]]:
        """Yield every client with its upload, in the order of `turns`, which holds clients with their downloads."""


class Sequential(Executor):
    """One client after another in this process."""

    name = "sequential"

    def __call__(
        self, method: Method, turns: Iterable[tuple[Client, Message | None]]
    ) -> Iterator[tuple[Client, Message | None]]:
        """Yield every client with its upload, in the order of `turns`."""
        for client, download in turns:
            client.runtime.hold(client.architecture, None)
            seed_everything(client.seed, "client", client.round, client.id)
            try:
                upload = method.local_update(client, download)
            except UserError as error:
                raise UserError(f"{_who(client)}: {error}") from error
            except Exception as error:
                hint = "local.batch_size or evaluation.batch_size, or give it a smaller model"
                if (known := out_of_memory(error, _who(client), hint)) is not None:
                    raise known from error
                if sys.version_info >= (3, 11):
                    error.add_note(f"while {_who(client)} took its turn")
                raise
            yield client, upload


def _who(client: Client) -> str:
    return f"client {client.id} ({client.architecture}) in round {client.round}"


EXECUTORS: dict[str, type[Executor]] = {executor.name: executor for executor in (Sequential,)}
