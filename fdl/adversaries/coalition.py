"""Groups of Byzantine clients, and the only place where their uploads replace honest ones."""

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
    """One entry of a recipe's adversaries: clients with the same attack that know each other.

    Attributes:
        adversary: the attack.
        clients: the clients, by id.
        start: the first round of the attack.
    """

    adversary: Adversary
    clients: Mapping[int, Client]
    start: int = 1


class Adversaries:
    """All Byzantine clients of a run; maps honest uploads to the uploads that are sent.

    Args:
        groups: one per recipe entry; no client is in two.
    """

    def __init__(self, groups: Sequence[AdversaryGroup] = ()):
        self.groups = tuple(groups)
        self._downloads: dict[int, Upload | None] = {}

    def active(self, round: int) -> dict[int, AdversaryGroup]:
        """Return the group of every client that attacks in a round, by client id."""
        return {id: one for one in self.groups if round >= one.start for id in one.clients}

    def needs_all_uploads(self, round: int) -> bool:
        """Return True if an attack of the round needs other clients' uploads; the same on every rank."""
        return any(one.adversary.sees != "nobody" for one in self.active(round).values())

    def record_downloads(
        self, round: int, turns: Iterable[tuple[Client, Upload | None]]
    ) -> Iterator[tuple[Client, Any]]:
        """Pass turns on, and keep the downloads of this round's attackers.

        Args:
            round: the current round.
            turns: clients with their downloads.

        Yields:
            The same pairs in the same order.
        """
        attackers = self.active(round)
        self._downloads = {}
        for client, download in turns:
            if client.id in attackers:
                self._downloads[client.id] = download
            yield client, download

    def corrupt_uploads(
        self, round: int, pairs: Iterable[tuple[Client, Upload | None]], gather: Gather = dict
    ) -> Iterator[tuple[Client, Upload | None]]:
        """Replace the honest uploads of this round's attackers.

        If no attack needs other clients' uploads, they are passed on one by one. Otherwise all uploads of the round are
        copied and kept until the last has arrived; memory then grows with the size of the cohort.

        Args:
            round: the current round.
            pairs: clients of this process with their uploads, before anything is encoded.
            gather: returns the uploads of all ranks, by client, given those of this one. It is called once, on every
                rank, in rounds for which `needs_all_uploads` is true, and in no others.

        Yields:
            The same clients in the same order, with the uploads to send.
        """
        attackers = self.active(round)
        if not attackers:
            yield from pairs
            return
        if not self.needs_all_uploads(round):
            for client, upload in pairs:
                yield client, self._upload_of(client, upload, attackers, {})
            return
        held = [(client, copy.deepcopy(upload)) for client, upload in pairs]  # it may lie in a module others fill
        uploads = gather({client.id: upload for client, upload in held if upload is not None})
        for client, upload in held:
            yield client, self._upload_of(client, upload, attackers, uploads)

    def _upload_of(
        self, client: Client, own: Upload | None, attackers: Mapping[int, AdversaryGroup], uploads: Mapping[int, Upload]
    ) -> Upload | None:
        group = attackers.get(client.id)
        if group is None or own is None:
            return own
        sees = group.adversary.sees
        context = AttackContext(
            client=client,
            own=own,
            download=self._downloads.get(client.id),
            honest=[uploads[id] for id in sorted(uploads) if id not in attackers] if sees == "all" else (),
            allies={id: uploads[id] for id in sorted(group.clients) if id in uploads},
            clients=group.clients,
            num_uploads=max(len(uploads), 1),
            num_attackers=max(len(uploads.keys() & attackers.keys()), 1),
        )
        try:
            return group.adversary.attack(context)
        except UserError as error:
            raise UserError(f"client {client.id} in round {client.round}: {error}") from error


def assign_adversaries(entries: Sequence[AdversaryConfig], clients: int, seed: int) -> list[list[int]]:
    """Select the clients of each entry: those it names, or its share of the others, drawn from a separate stream.

    Entries that give a share take it from one random order of all clients that no entry names, one after the other, so
    that a larger share has all the clients of a smaller one.

    Args:
        entries: the recipe's `adversaries`.
        clients: number of clients.
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
        count = num_adversaries(entry.fraction, clients)
        result.append(sorted(order[:count]))
        order = order[count:]
    return result


def num_adversaries(fraction: float, clients: int) -> int:
    """Return the number of clients that a fraction amounts to, rounded."""
    return int(fraction * clients + 0.5)


def form_group(adversary: Adversary, start: int, clients: Sequence[Client], method: Method) -> AdversaryGroup:
    """Form the group of a recipe entry: check that the attack applies, and install its corruption of data.

    Args:
        adversary: the attack.
        start: its first round.
        clients: the clients that it controls.
        method: the federated method of the run.

    Raises:
        UserError: the method sends nothing that the attack changes, or the data do not fit it.
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
    """Compare the targets of an attack with the messages that the method declares.

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
