"""Checks for training that diverges, and for rounds without a single usable upload."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.state.shards import local_shard

if TYPE_CHECKING:
    from fdl.comm.ledger import Ledger
    from fdl.engine.distributed.process_group import ProcessGroup
    from fdl.methods.base import Method
    from fdl.participants import Client, Server

log = logging.getLogger("fdl")

_ADVICE = "lower the learning rate of {fit}.optimizer, set {fit}.gradient_clip, or take another fabric.precision"


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if no number is NaN or infinite; of a tensor that is sharded over ranks, in this rank's shard."""
    return all(bool(torch.isfinite(local_shard(tensor)).all()) for tensor in tensors if tensor.is_floating_point())


def require_finite(server: Server, round: int) -> None:
    """Raise if the student's weights are not finite after the server's training; every rank calls this.

    Args:
        server: the server after its update of a round.
        round: the round.

    Raises:
        UserError: they are not; the message names the round and the losses.
    """
    losses = _losses(server.metrics)
    if server.student is None or not losses:  # weights that were not trained here came in messages, which are validated
        return
    ranks = server.runtime.ranks
    if ranks.any(not all_finite(server.student.parameters())):
        fit = "local_training" if server.pooled is not None else "server_distil"
        sentence = (
            f"round {round}: the student's training on the server diverged, its weights are not finite any more "
            f"({_worst_first(losses)}); {_ADVICE.format(fit=fit)}"
        )
        ranks.raise_on_any_failure(UserError(sentence), [sentence] * ranks.count)


def require_finite_client(client: Client) -> None:
    """Raise if the weights of a client that uploads nothing are not finite after its training.

    If a client does upload, the server rejects the message and continues with the others.

    Args:
        client: the client after its turn.

    Raises:
        UserError: they are not; the message names the client, the round and the losses.
    """
    losses = _losses(client.metrics)
    if losses and not all_finite(client.state.get("specialist", {}).values()):
        raise UserError(
            f"client {client.id}, round {client.round}: training diverged, the model's weights are not finite any more "
            f"({_worst_first(losses)}); {_ADVICE.format(fit='local_training')}"
        )


def warn_without_uploads(
    method: Method, history: Sequence[Mapping[str, Any]], record: Mapping[str, Any], awaited: int, ledger: Ledger
) -> None:
    """Warn in a round without a usable upload, unless the round before was one, too, or if no client sent anything.

    Args:
        method: the federated algorithm.
        history: the records of all rounds before.
        record: of the round.
        awaited: number of rounds so far, of those run by this process, with an aggregate that awaited uploads.
        ledger: the bytes of every message.
    """
    if not _uploads(method, awaited):
        return
    if not _has_upload(record):
        if not history or _has_upload(history[-1]):
            log.warning("round %d: no message of any client could be used: %s", record["round"], _why([record]))
    elif awaited == 1 and not ledger.totals()["upload_bytes"]:
        log.warning("round %d: no client sent anything: %s", record["round"], _nothing_sent(method))


def require_uploads(
    method: Method, history: Sequence[Mapping[str, Any]], awaited: int, ledger: Ledger, ranks: ProcessGroup
) -> None:
    """Raise if no round of a finished run had a usable upload, or no client ever sent anything.

    Args:
        method: the federated algorithm.
        history: the records of all rounds.
        awaited: number of rounds, of those run by this process, with an aggregate that awaited uploads.
        ledger: the bytes of every message.
        ranks: the processes, which all raise.

    Raises:
        UserError: the message names the most frequent reason.
    """
    if not history or not _uploads(method, awaited):
        return
    rounds, sentence = len(history), ""
    if not any(map(_has_upload, history)):
        sentence = (
            f"no message of any client could be used in any of {rounds} round(s), so nothing was learnt from them: "
            f"{_why(history)}"
        )
    elif awaited and not ledger.totals()["upload_bytes"]:
        sentence = (
            f"no client sent anything in any of {rounds} round(s), so nothing was learnt from them: "
            f"{_nothing_sent(method)}"
        )
    if sentence:
        ranks.raise_on_any_failure(UserError(sentence), [sentence] * ranks.count)


def _uploads(method: Method, awaited: int) -> bool:
    """True if the method's clients upload anything; if it does not declare that, if an aggregate awaited uploads."""
    return bool(awaited if method.sends is None else method.sends)


def _nothing_sent(method: Method) -> str:
    name = type(method).__name__
    return (
        f"{name}.local_update returned None for every client, and {name}.aggregate waits for messages; return a "
        "Message from the one, or let the method declare `sends = ()`"
    )


def _has_upload(record: Mapping[str, Any]) -> bool:
    left = {str(client) for client in record["cohort"]} - {str(client) for client in record["dropped"]}
    return bool(left - set(record["refused"]))


def _why(records: Iterable[Mapping[str, Any]]) -> str:
    refused = [(reason, client) for record in records for client, reason in record["refused"].items()]
    if not refused:
        return "every client of the cohort dropped out, or the cohort was empty"
    (reason, count), *_ = Counter(reason for reason, _ in refused).most_common()
    who = sorted({client for why, client in refused if why == reason}, key=int)
    clients = f"client{'s' if len(who) > 1 else ''} {', '.join(who[:8])}{' and others' if len(who) > 8 else ''}"
    return f"{len(refused)} refused, {count} of them since: {reason} ({clients})"


def _losses(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.endswith("/loss")}


def _worst_first(losses: Mapping[str, float]) -> str:
    """Format losses, those that are not finite first."""
    ordered = sorted(losses.items(), key=lambda item: math.isfinite(item[1]))
    return ", ".join(f"{name} is {value:.4g}" for name, value in ordered)
