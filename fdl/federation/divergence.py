"""Trainings that turn to NaN, and rounds in which nothing that clients sent could be used."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.methods.base import Method
from fdl.state.shards import local_shard

if TYPE_CHECKING:
    from fdl.federation.state import Federation
    from fdl.participants import Client

log = logging.getLogger("fdl")

_ADVICE = "lower the learning rate of {fit}.optimizer, set {fit}.gradient_clip, or take another fabric.precision"


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in any of the tensors is NaN or infinite; of one that is spread over ranks, this one's part."""
    return all(bool(torch.isfinite(local_shard(tensor)).all()) for tensor in tensors if tensor.is_floating_point())


def require_finite(loop: Federation, round: int) -> None:
    """Raise where the server's training has left its student with weights that are not finite.

    Args:
        loop: the run, after the server's step of a round.
        round: the round.

    Raises:
        UserError: naming round and losses.
    """
    server, losses = loop.server, _losses(loop.server.metrics)
    if server.student is None or not losses:  # what was not trained here came in messages, which were looked at
        return
    ranks = loop.runtime.ranks
    if ranks.any(not all_finite(server.student.parameters())):
        fit = "local" if server.pooled is not None else "distil"
        sentence = (
            f"round {round}: the student's training on the server diverged, its weights are not finite any more "
            f"({_said(losses)}); {_ADVICE.format(fit=fit)}"
        )
        ranks.raise_on_any_failure(UserError(sentence), [sentence] * ranks.count)


def require_finite_client(client: Client) -> None:
    """Raise where a client that sends nothing has trained its model until the weights are not finite any more.

    Of those that do send something, the server refuses the message and goes on with the others.

    Args:
        client: after its turn.

    Raises:
        UserError: naming client, round and losses.
    """
    losses = _losses(client.metrics)
    if losses and not all_finite(client.state.get("specialist", {}).values()):
        raise UserError(
            f"client {client.id}, round {client.round}: training diverged, the model's weights are not finite any more "
            f"({_said(losses)}); {_ADVICE.format(fit='local')}"
        )


def warn_unheard(loop: Federation, record: Mapping[str, Any]) -> None:
    """Say so in the first round in which nothing that a client sent could be used, or the first after others.

    Args:
        loop: the run; its history ends with the round before.
        record: of the round.
    """
    if _sends(loop) and not _heard(record) and (not loop.history or _heard(loop.history[-1])):
        log.warning("round %d: no message of any client could be used: %s", record["round"], _why([record]))


def require_heard(loop: Federation) -> None:
    """Raise where no message of any client could be used in any round of a run that is over.

    Raises:
        UserError: naming the commonest reason.
    """
    if loop.history and _sends(loop) and not any(map(_heard, loop.history)):
        sentence = (
            f"no message of any client could be used in any of {len(loop.history)} round(s), so nothing was learnt "
            f"from them: {_why(loop.history)}"
        )
        ranks = loop.runtime.ranks
        ranks.raise_on_any_failure(UserError(sentence), [sentence] * ranks.count)


def _sends(loop: Federation) -> bool:
    return type(loop.method).aggregate is not Method.aggregate


def _heard(record: Mapping[str, Any]) -> bool:
    left = {str(client) for client in record["cohort"]} - {str(client) for client in record["dropped"]}
    return bool(left - set(record["refused"]))


def _why(records: Iterable[Mapping[str, Any]]) -> str:
    refused = [(reason, client) for record in records for client, reason in record["refused"].items()]
    if not refused:
        return "every client that was asked dropped out, or none was there to be asked"
    (reason, count), *_ = Counter(reason for reason, _ in refused).most_common()
    who = sorted({client for why, client in refused if why == reason}, key=int)
    clients = f"client{'s' if len(who) > 1 else ''} {', '.join(who[:8])}{' and others' if len(who) > 8 else ''}"
    return f"{len(refused)} refused, {count} of them since: {reason} ({clients})"


def _losses(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.endswith("/loss")}


def _said(losses: Mapping[str, float]) -> str:
    """The losses, those that are not finite first."""
    ordered = sorted(losses.items(), key=lambda item: math.isfinite(item[1]))
    return ", ".join(f"{name} is {value:.4g}" for name, value in ordered)
