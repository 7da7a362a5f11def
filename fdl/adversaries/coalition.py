"""Who of the clients is dishonest, and the one place where their uploads take the place of honest ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fdl.adversaries.base import SPACES, Adversary, AttackContext, Upload
from fdl.errors import UserError
from fdl.methods.base import Method
from fdl.utils.seeding import numpy_stream, torch_stream

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.participants import Client
    from fdl.recipe.config import AdversaryConfig

Gather = Callable[[dict[int, Upload]], Mapping[int, Upload]]


@dataclass(frozen=True)
class AdversaryGroup:
    """One entry of a recipe's adversaries: clients that do the same and know of each other.

    Attributes:
        adversary: what they do.
        clients: who they are, by id.
        start: the round from which they do it.
    """

    adversary: Adversary
    clients: Mapping[int, Client]
    start: int = 1


class Adversaries:
    """All dishonest clients of a run; maps what clients would honestly send to what is sent.

    Args:
        coalitions: by entry; no client is in two.
    """

    def __init__(self, coalitions: Sequence[AdversaryGroup] = ()):
        self.coalitions = tuple(coalitions)
        self._downloads: dict[int, Upload | None] = {}

    def active(self, round: int) -> dict[int, AdversaryGroup]:
        """The coalition of every client that is dishonest in a round."""
        return {id: one for one in self.coalitions if round >= one.start for id in one.clients}

    def needs_all_uploads(self, round: int) -> bool:
        """Whether uploads of a round must be known to others before they are sent: the same on every rank."""
        return any(one.adversary.sees != "nobody" for one in self.active(round).values())

    def record_downloads(
        self, round: int, turns: Iterable[tuple[Client, Upload | None]]
    ) -> Iterator[tuple[Client, Any]]:
        """Pass turns on, and keep what dishonest clients are sent in this round."""
        hostile = self.active(round)
        self._downloads = {}
        for client, download in turns:
            if client.id in hostile:
                self._downloads[client.id] = download
            yield client, download

    def corrupt_uploads(
        self, round: int, pairs: Iterable[tuple[Client, Upload | None]], gather: Gather = dict
    ) -> Iterator[tuple[Client, Upload | None]]:
        """Put what dishonest clients send in the place of what honest ones would.

        Where nobody needs to see others, uploads are passed on one by one. Otherwise all uploads of the round are
        copied and held until the last is there; memory then grows with the clients of the round.

        Args:
            round: the current round.
            pairs: clients of this process with their uploads, before anything is encoded.
            gather: gives the uploads of all ranks, by client, for those of this one. It is called once, on every rank,
                in rounds of which `needs_all_uploads` is true, and in no others.

        Yields:
            The same clients in the same order, with what they send.
        """
        hostile = self.active(round)
        if not hostile:
            yield from pairs
            return
        if not self.needs_all_uploads(round):
            for client, upload in pairs:
                yield client, self._sent(client, upload, hostile, {})
            return
        held = [(client, copy.deepcopy(upload)) for client, upload in pairs]  # it may lie in a module others fill
        everybody = gather({client.id: upload for client, upload in held if upload is not None})
        for client, upload in held:
            yield client, self._sent(client, upload, hostile, everybody)

    def _sent(
        self, client: Client, own: Upload | None, hostile: Mapping[int, AdversaryGroup], everybody: Mapping[int, Upload]
    ) -> Upload | None:
        coalition = hostile.get(client.id)
        if coalition is None or own is None:
            return own
        sees = coalition.adversary.sees
        scene = AttackContext(
            client=client,
            own=own,
            download=self._downloads.get(client.id),
            honest=[everybody[id] for id in sorted(everybody) if id not in hostile] if sees == "all" else (),
            allies={id: everybody[id] for id in sorted(coalition.clients) if id in everybody},
            clients=coalition.clients,
            heard=max(len(everybody), 1),
            hostile=max(len(everybody.keys() & hostile.keys()), 1),
        )
        try:
            return coalition.adversary.attack(scene)
        except UserError as error:
            raise UserError(f"client {client.id} in round {client.round}: {error}") from error


def chosen(entries: Sequence[AdversaryConfig], clients: int, seed: int) -> list[list[int]]:
    """The clients of each entry: those it names, or its share of the others, drawn from a stream of its own.

    Entries that give a share take it from one random order of all clients that no entry names, one after the other, so
    that a larger share has all the clients of a smaller one.

    Args:
        entries: of the recipe.
        clients: how many there are.
        seed: the recipe's seed.

    Returns:
        Sorted ids for each entry.
    """
    named = {client for entry in entries for client in entry.clients or ()}
    order = [c for c in numpy_stream(seed, "adversaries").permutation(clients).tolist() if c not in named]
    result = []
    for entry in entries:
        if entry.clients is not None:
            result.append(sorted(entry.clients))
            continue
        count = how_many(entry.fraction, clients)
        result.append(sorted(order[:count]))
        order = order[count:]
    return result


def how_many(fraction: float, clients: int) -> int:
    """The number of clients that a fraction comes to, rounded."""
    return int(fraction * clients + 0.5)


def recruit(adversary: Adversary, start: int, clients: Sequence[Client], method: Method) -> AdversaryGroup:
    """Let clients play an adversary: see that they can, and give them what it does to their data.

    Raises:
        UserError: the method sends nothing that it attacks, or the data are not for it.
    """
    _check_space(adversary, method)
    for client in clients:
        if adversary.tasks and client.task not in adversary.tasks:
            raise UserError(
                f"{adversary.name} is for {' and '.join(adversary.tasks)} data; these are for {client.task}"
            )
        adversary.prepare(client)
        client.data_corruption, client.corruption_start = partial(_corrupt, adversary, client), start
    return AdversaryGroup(adversary, {client.id: client for client in clients}, start)


def _corrupt(adversary: Adversary, client: Client, samples: Samples, purpose: str) -> Samples:
    return adversary.corrupt(samples, torch_stream(client.seed, f"adversary/{purpose}", 0, client.id))


def _check_space(adversary: Adversary, method: Method) -> None:
    """Compare what an adversary attacks with what the method declares that clients send.

    Raises:
        UserError: they have nothing in common, or the method does not declare it.
    """
    if method.sends == ():
        raise UserError(f"clients of method {method.name} send nothing that could be attacked")
    if "data" in adversary.spaces:
        return
    if method.sends is None:
        raise UserError(
            f"{adversary.name} attacks {' and '.join(adversary.spaces)}, and method {method.name} does not declare "
            f"what its clients send: add to {type(method).__name__} a line such as `sends = (Parameters,)`, with the "
            "types of the messages that local_update returns"
        )
    if {SPACES[kind] for kind in method.sends if kind in SPACES} & set(adversary.spaces):
        return
    found = " and ".join(sorted(kind.kind for kind in method.sends))
    raise UserError(
        f"{adversary.name} attacks {' and '.join(adversary.spaces)}, and clients of method {method.name} send {found}"
    )
