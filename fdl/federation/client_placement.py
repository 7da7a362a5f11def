"""Client placement: the rank that holds each client's state, and what ranks exchange in a round."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdl.comm.ledger import CodecChoice, LedgerEntry, RejectedMessage
from fdl.federation.message_transport import from_tensors, to_tensors
from fdl.federation.scheduling import largest_first
from fdl.state import checkpoint
from fdl.state.weights import count_parameters

if TYPE_CHECKING:
    from pathlib import Path

    from fdl.comm.channel import Channel
    from fdl.engine.distributed.process_group import ProcessGroup
    from fdl.messages import Bundle, Message
    from fdl.participants import Client


class ClientPlacement:
    """The assignment of clients to ranks.

    A client runs on the rank that holds its state, unless that rank would then work much longer than the others; the
    most expensive clients are placed first, by the seconds of their last turn, before that by samples times parameters.
    The codec states of both ends of the client's link move with its state. Results do not depend on the assignment.

    Args:
        ranks: the processes.
        clients: all clients, by id; every rank has their data.
        channel: holds the links' codec states and the ledger.
        folder: folder of client states that are not in memory, shared by all ranks.

    Attributes:
        homes: the rank that has each client's newest state, by id.
    """

    def __init__(self, ranks: ProcessGroup, clients: Sequence[Client], channel: Channel, folder: Path):
        self.ranks, self.clients, self.channel, self.folder = ranks, clients, channel, folder
        self.costs = [0.0] * len(clients)
        self._measured, self._shared_round = [False] * len(clients), 0
        self.homes = [ranks.index] * len(clients)
        if not self.holds_all_clients:
            self.costs = [float(max(client.samples, 1) * _size(client)) for client in clients]
            for client, rank in largest_first(range(len(clients)), self.costs, ranks.count).items():
                self.homes[client] = rank

    @property
    def holds_all_clients(self) -> bool:
        """True if this process holds all clients: it is the only one, or models are sharded."""
        return self.ranks.count == 1 or self.ranks.sharded

    def local_clients(self) -> list[Client]:
        """List the clients whose newest state is on this rank."""
        return [client for client in self.clients if self.homes[client.id] == self.ranks.index]

    def place(self, cohort: Sequence[int]) -> list[int]:
        """Assign a round's turns to ranks, and move the states of clients that change ranks.

        Args:
            cohort: ids of the round's clients.

        Returns:
            The ids of this rank's clients, in the same order.
        """
        if self.holds_all_clients:
            return list(cohort)
        placed = largest_first(cohort, self.costs, self.ranks.count, self.homes)
        moving = [client for client in cohort if placed[client] != self.homes[client]]
        if moving:
            leaving = [client for client in moving if self.homes[client] == self.ranks.index]
            states = self._merged(self.ranks.gather(checkpoint.to_bytes(self._states(leaving))))
            for client in moving:
                self.homes[client] = placed[client]
                if placed[client] == self.ranks.index:
                    self._restore_client(client, states)
            self._clear_clients(leaving)
        return [client for client in cohort if placed[client] == self.ranks.index]

    def share_uploads(self, round: int, uploads: Mapping[int, Message | Bundle]) -> dict[int, Message | Bundle]:
        """Exchange the uploads of all ranks before anything is encoded, once per round.

        Args:
            round: the current round.
            uploads: this rank's, by client.

        Returns:
            The uploads of all ranks, by client; empty where the round's were exchanged before.
        """
        if self.holds_all_clients:
            return dict(uploads)
        packed = {str(client): to_tensors(upload) for client, upload in uploads.items()}
        if self._shared_round == round:
            return {}
        self._shared_round = round
        every = self.ranks.gather(checkpoint.to_bytes(packed))
        return {int(client): from_tensors(one) for data in every for client, one in checkpoint.from_bytes(data).items()}

    def exchange_results(
        self, record: dict[str, Any], turns: Mapping[int, float], uploads: Mapping[int, Message | Bundle], error: str
    ) -> tuple[list[str], list[tuple[int, Message | Bundle]]]:
        """Exchange the results of every rank's clients in a round.

        Args:
            record: the round's record; the other ranks' clients and rejections are added, in the cohort's order.
            turns: seconds of the turns taken here, by client.
            uploads: decoded here and yet to be added to the aggregate, by client.
            error: the reason why this rank cannot continue; empty if it can.

        Returns:
            The error of each rank, and the uploads of all ranks in the cohort's order.
        """
        ledger, round = self.channel.ledger, record["round"]
        own = set(self._local(record["cohort"]))
        report = {
            "error": error,
            "clients": record["clients"],
            "refused": record["refused"],
            "turns": {str(client): seconds for client, seconds in turns.items()},
            "rows": [list(row) for row in ledger.of_round(round) if row.client in own],
            "refusals": [list(r) for r in ledger.refusals if r.round == round and r.client in own],
            "notes": [list(n) for n in ledger.notes if n.round == round and n.client in own],
        }
        packed = {str(client): to_tensors(upload) for client, upload in uploads.items()}
        every = self.ranks.gather(checkpoint.to_bytes({"report": json.dumps(report), "uploads": packed}))
        received: dict[int, Message | Bundle] = {}
        errors, order = [], {str(client): i for i, client in enumerate(record["cohort"])}
        for rank, data in enumerate(every):
            one = checkpoint.from_bytes(data)
            other = json.loads(one["report"])
            errors.append(other["error"])
            for client, upload in one["uploads"].items():
                received[int(client)] = from_tensors(upload)
            for client, seconds in other["turns"].items():
                self._update_cost(int(client), seconds)
            if rank != self.ranks.index:
                ledger.include(
                    (LedgerEntry(*row) for row in other["rows"]),
                    (RejectedMessage(*refusal) for refusal in other["refusals"]),
                    (CodecChoice(*note) for note in other["notes"]),
                )
                record["clients"].update(other["clients"])
                record["refused"].update(other["refused"])
        for part in ("clients", "refused"):
            record[part] = dict(sorted(record[part].items(), key=lambda item: order[item[0]]))
        return errors, sorted(received.items(), key=lambda item: order[str(item[0])])

    def gather_states(self) -> dict[str, Any]:
        """Collect every client's state and its link's codec states on the leader; empty on the other ranks."""
        own = self._states([client.id for client in self.local_clients()])
        return own if self.holds_all_clients else self._merged(self.ranks.collect(checkpoint.to_bytes(own)))

    def replicate_states(self) -> None:
        """Copy all clients' states and their links' codec states to every rank, e.g. for an audit of all clients."""
        if self.holds_all_clients:
            return
        mine = {client.id for client in self.local_clients()}
        states = self._merged(self.ranks.gather(checkpoint.to_bytes(self._states(sorted(mine)))))
        for client in self.clients:
            if client.id not in mine:
                self._restore_client(client.id, states)

    def restore(self, states: Mapping[str, Any]) -> None:
        """Restore the result of `gather_states`; each rank keeps the states of its own clients.

        Args:
            states: the states, complete on every rank.
        """
        own = {client.id for client in self.local_clients()}
        for client in self.clients:
            client.restore(states["clients"].get(str(client.id), {}) if client.id in own else {}, self.folder)
        links = states["channel"].items()
        self.channel.load_state_dict({key: value for key, value in links if int(key.split("/")[1]) in own})

    def _local(self, cohort: Iterable[int]) -> list[int]:
        return [client for client in cohort if self.homes[client] == self.ranks.index]

    def _states(self, ids: Iterable[int]) -> dict[str, Any]:
        ids = list(ids)
        clients = {str(client): saved for client in ids if (saved := self.clients[client].checkpoint_state())}
        return {"clients": clients, "channel": self.channel.state_dict(ids)}

    def _restore_client(self, client: int, states: Mapping[str, Any]) -> None:
        self.clients[client].restore(states["clients"].get(str(client), {}), self.folder)
        self.channel.restore(client, states["channel"])

    def _clear_clients(self, ids: Iterable[int]) -> None:
        for client in ids:
            self.clients[client].restore({}, self.folder)
            self.channel.restore(client, {})

    @staticmethod
    def _merged(every: Sequence[bytes]) -> dict[str, Any]:
        merged: dict[str, Any] = {"clients": {}, "channel": {}}
        for data in every:
            for part, states in checkpoint.from_bytes(data).items():
                merged[part].update(states)
        return merged

    def _update_cost(self, client: int, seconds: float) -> None:
        """Set a client's cost to the seconds of its last turn; the first one also rescales all other estimates."""
        if not any(self._measured) and self.costs[client] > 0:
            rate = seconds / self.costs[client]
            self.costs = [cost * rate for cost in self.costs]
        self.costs[client], self._measured[client] = seconds, True


def _size(client: Client) -> int:
    return count_parameters(client.runtime.shared_module(client.architecture))
