"""What server and clients say to each other in a round, and what of it is refused."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fdl.errors import RejectedMessageError, UserError
from fdl.federation.divergence import require_finite_client

if TYPE_CHECKING:
    from fdl.federation.state import Federation
    from fdl.knowledge.aggregation.base import Aggregate
    from fdl.messages import Bundle, Message
    from fdl.participants import Client


def broadcast(
    loop: Federation, cohort: Iterable[int], dropped: Collection[int], record: dict[str, Any]
) -> Iterator[tuple[Client, Message | None]]:
    """Carry the server's word of a round to clients.

    Args:
        loop: the run.
        cohort: ids.
        dropped: those who are sent it and not heard again.
        record: of the round; gets ``refused``.

    Yields:
        Clients that have a turn now, with what they received.
    """
    for client in cohort:
        try:
            download = loop.send(client)
        except RejectedMessageError as refusal:  # whom the server's word does not reach has nothing to answer
            _reject(loop, client, refusal, record)
            continue
        if client not in dropped:
            yield loop.clients[client], download


def collect_uploads(
    loop: Federation,
    honest: Iterable[tuple[Client, Message | Bundle | None]],
    aggregate: Aggregate | None,
    record: dict[str, Any],
) -> None:
    """Carry uploads to the server as they are made, and add them up; what cannot be used is refused and counted.

    A link goes on from an upload only where the aggregate has taken it: after one that was refused, both ends remember
    the one before.

    With several ranks, each carries what its own clients say; at the end all ranks have added what anybody said.

    Args:
        loop: the run.
        honest: clients that have taken their turn, with what they would send; what adversaries send is another thing.
        aggregate: empty; None where nobody sends anything.
        record: of the round; gets ``clients`` and ``refused``.

    Raises:
        UserError: a client's turn ended in an error, here or on another rank.
    """
    round, streams = record["round"], loop.spread.alone or hasattr(aggregate, "reduce")
    looks = loop.adversaries.looks(round)  # then nobody's upload is sent before all turns are over, on any rank
    seconds: dict[int, float] = {}
    waiting: dict[int, Message | Bundle] = {}
    failure: Exception | None = None
    start = time.perf_counter()
    try:
        for client, upload in loop.adversaries(round, honest, partial(loop.spread.share_uploads, round)):
            record["clients"][str(client.id)] = client.metrics
            try:
                if aggregate is None:
                    require_finite_client(client)
                received = loop.channel.upload(upload, client.id, round)
                if aggregate is not None and received is not None:
                    if streams:
                        with loop.seconds.part("aggregate"):
                            aggregate.add(received, client.id)
                    else:
                        waiting[client.id] = received
                if client.id not in waiting:
                    loop.channel.confirm(client.id)
            except RejectedMessageError as refusal:
                _reject(loop, client.id, refusal, record)
            now = time.perf_counter()
            start, seconds[client.id] = now, now - start
            loop.callbacks.on_client_end(loop, round, client.id, client.metrics)
            client.rest()
    except Exception as error:
        if loop.spread.alone:
            raise
        failure = error
        if looks:  # the others wait for what it has to show
            loop.spread.share_uploads(round, {})
    if loop.spread.alone:
        return
    told, heard = loop.spread.exchange_results(record, {} if looks else seconds, waiting, _said(failure))
    loop.runtime.ranks.raise_on_any_failure(failure, told)
    with loop.seconds.part("aggregate"):
        for client, received in heard:
            try:
                aggregate.add(received, client)
                loop.channel.confirm(client)
            except RejectedMessageError as refusal:
                _reject(loop, client, refusal, record)
        if aggregate is not None and streams:
            aggregate.reduce(loop.runtime.ranks)


def _reject(loop: Federation, client: int, refusal: RejectedMessageError, record: dict[str, Any]) -> None:
    """Count a message that was not used, and note why."""
    loop.ledger.refuse(record["round"], client, refusal.reason)
    record["refused"][str(client)] = refusal.reason


def _said(failure: Exception | None) -> str:
    if failure is None:
        return ""
    return str(failure) if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
