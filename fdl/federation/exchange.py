"""Downloads and uploads of one round, and rejection of messages that cannot be used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fdl.errors import RejectedMessageError, UserError
from fdl.federation.divergence import require_finite_client
from fdl.knowledge.aggregation.base import Aggregate
from fdl.messages import parts_of, require_message

if TYPE_CHECKING:
    from fdl.adversaries.coalition import Adversaries
    from fdl.comm.channel import Channel
    from fdl.federation.client_placement import ClientPlacement
    from fdl.messages import Bundle, Message
    from fdl.methods.base import Method
    from fdl.participants import Client
    from fdl.utils.stopwatch import Stopwatch

OnClientEnd = Callable[[int, dict[str, float]], None]
"""Called with a client's id and the metrics of its turn, once its upload has arrived or was rejected."""


class RoundExchange:
    """The messages of one round between the server and a cohort.

    A message that cannot be used is rejected, counted in the ledger, and noted in the record; the round goes on.

    Args:
        method: the federated algorithm, which declares what its clients upload.
        record: the round's record, with ``round``, ``cohort`` and ``dropped``; gets ``clients``, the metrics of each
            client's turn, and ``refused``, the reasons for rejecting messages, both by client.
        channel: carries messages as bytes, and counts them.
        placement: the assignment of clients to ranks.
        adversaries: the dishonest clients, which upload something else than they computed.
        clock: measures the time of aggregation.
    """

    def __init__(
        self,
        method: Method,
        record: dict[str, Any],
        channel: Channel,
        placement: ClientPlacement,
        adversaries: Adversaries,
        clock: Stopwatch,
    ):
        self.method, self.record, self.round = method, record, int(record["round"])
        self.channel, self.placement, self.adversaries, self.clock = channel, placement, adversaries, clock

    def broadcast(
        self, cohort: Iterable[int], download: Callable[[int], Message | Bundle | None]
    ) -> Iterator[tuple[Client, Any]]:
        """Send every client its download; one that drops out receives it, and does not upload.

        Args:
            cohort: ids of the clients that this rank runs.
            download: sends the server's message to a client, given its id, and returns the message that arrives.

        Yields:
            Clients whose turn is next, with their downloads.
        """
        dropped = set(self.record["dropped"])
        for id in cohort:
            try:
                message = download(id)
            except RejectedMessageError as rejection:  # a client that missed the download does not upload
                self._reject(id, rejection)
                continue
            if id not in dropped:
                yield self.placement.clients[id], message

    def collect(
        self,
        turns: Iterable[tuple[Client, Message | Bundle | None]],
        aggregate: Aggregate | None,
        on_client_end: OnClientEnd,
    ) -> None:
        """Send uploads to the server as clients finish, and add them to the aggregate.

        With several ranks each sends the uploads of its own clients; in the end every rank has added all of them, or
        only its own, in an aggregate that can `reduce` over ranks.

        Args:
            turns: clients that have taken their turn, with the upload of an honest client.
            aggregate: an empty aggregate; None for a method whose clients upload nothing.
            on_client_end: called after each client.

        Raises:
            UserError: a client's turn ended in an error, here or on another rank.
        """
        if aggregate is not None and not isinstance(aggregate, Aggregate):
            raise UserError(
                f"method {type(self.method).__name__}: aggregate() returned a {type(aggregate).__name__}; derive it "
                f"from {Aggregate.__module__}.Aggregate, or return a WeightedMean"
            )
        inbox = _Inbox(aggregate, self.placement, self.channel, self.clock)
        # in this case no upload is sent before all turns are over, on any rank, and turns cannot be timed
        held_back = self.adversaries.needs_all_uploads(self.round)
        share_uploads = partial(self.placement.share_uploads, self.round)
        seconds: dict[int, float] = {}
        failure: Exception | None = None
        start = time.perf_counter()
        try:
            for client, upload in self.adversaries.corrupt_uploads(
                self.round, _messages(self.method, turns), share_uploads
            ):
                self.record["clients"][str(client.id)] = client.metrics
                self._receive(client, upload, inbox)
                now = time.perf_counter()
                start, seconds[client.id] = now, now - start
                on_client_end(client.id, client.metrics)
                client.offload_state()
        except Exception as error:
            if self.placement.holds_all_clients:
                raise
            failure = error
            if held_back:  # the other ranks wait for these uploads
                share_uploads({})
        if not self.placement.holds_all_clients:
            self._gather({} if held_back else seconds, inbox, failure)

    def _receive(self, client: Client, upload: Message | Bundle | None, inbox: _Inbox) -> None:
        """Send one upload to the server, which adds or rejects it."""
        try:
            if inbox.aggregate is None:
                require_finite_client(client)
            received = self.channel.upload(upload, client.id, self.round)
            if inbox.aggregate is None and received is not None:
                raise UserError(
                    f"method {type(self.method).__name__}: client {client.id} sent a message, and aggregate() returns "
                    "nothing that could take it in; return an Aggregate, e.g. a WeightedMean"
                )
            inbox.put(client.id, received)
        except RejectedMessageError as rejection:
            self._reject(client.id, rejection)

    def _gather(self, seconds: dict[int, float], inbox: _Inbox, failure: Exception | None) -> None:
        """Exchange uploads, records and failures among the ranks, and add the uploads that are not added yet."""
        errors, uploads = self.placement.exchange_results(self.record, seconds, inbox.waiting, _sentence(failure))
        ranks = self.placement.ranks
        ranks.raise_on_any_failure(failure, errors)
        with self.clock.part("aggregate"):
            for client, received in uploads:
                try:
                    inbox.add(client, received)
                except RejectedMessageError as rejection:
                    self._reject(client, rejection)
            if inbox.aggregate is not None and inbox.streams:
                inbox.aggregate.reduce(ranks)

    def _reject(self, client: int, rejection: RejectedMessageError) -> None:
        """Count a rejected message, and record the reason."""
        self.channel.ledger.reject(self.round, client, rejection.reason)
        self.record["refused"][str(client)] = rejection.reason


class _Inbox:
    """Uploads that have reached the server: added to the aggregate, or kept until all ranks have theirs.

    A link's codec state advances only once the aggregate has accepted an upload (`Channel.confirm`): after a rejected
    one, both ends keep the previous state.

    Attributes:
        streams: True if an upload is added as soon as it arrives: there is one rank, or the aggregate can `reduce`.
        waiting: uploads that are yet to be added, by client.
    """

    def __init__(self, aggregate: Aggregate | None, placement: ClientPlacement, channel: Channel, clock: Stopwatch):
        self.aggregate, self.channel, self.clock = aggregate, channel, clock
        self.streams = placement.holds_all_clients or (aggregate is not None and aggregate.reduces)
        self.waiting: dict[int, Message | Bundle] = {}

    def put(self, client: int, received: Message | Bundle | None) -> None:
        """Process one upload that has arrived.

        Args:
            client: the client's id.
            received: its upload; None if it sent nothing, which is always accepted.
        """
        if self.aggregate is None or received is None:
            self.channel.confirm(client)
        elif self.streams:
            with self.clock.part("aggregate"):
                self.add(client, received)
        else:
            self.waiting[client] = received

    def add(self, client: int, received: Message | Bundle) -> None:
        """Add one upload to the aggregate, and confirm it to its link.

        Args:
            client: the client's id.
            received: its upload.

        Raises:
            RejectedMessageError: the aggregate rejects it.
        """
        self.aggregate.add(received, client)
        self.channel.confirm(client)


def _messages(
    method: Method, turns: Iterable[tuple[Client, Message | Bundle | None]]
) -> Iterator[tuple[Client, Message | Bundle | None]]:
    """Pass uploads on as long as they are messages of the types that the method declares.

    Raises:
        UserError: an upload is something else.
    """
    for client, upload in turns:
        source = f"method {type(method).__name__}: local_update of client {client.id}"
        require_message(upload, source)
        if method.sends is not None and (others := parts_of(upload).keys() - set(method.sends)):
            declared = ", ".join(kind.__name__ for kind in method.sends) or "no message"
            raise UserError(f"{source} returned {others.pop().__name__}, and the method's `sends` declares {declared}")
        yield client, upload


def _sentence(failure: Exception | None) -> str:
    """Format an error as a sentence for the other ranks; empty if there is none."""
    if failure is None:
        return ""
    return str(failure) if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
