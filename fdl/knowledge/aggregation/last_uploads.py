"""The last upload of every client, kept by the server where an option needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.messages import Features, Message, Prototypes, Responses
from fdl.participants import Server

Parts = dict[type[Message], Message]


@dataclass(frozen=True, eq=False)
class ExactLogWeights:
    """Exact log-weights, instead of `QuantizedLogWeights`, for responses that are not transmitted.

    Attributes:
        logs: float32 [n].
    """

    logs: Tensor

    def values(self) -> Tensor:
        """The log-weights."""
        return self.logs

    def validate(self) -> None:
        """Accept any values: they come from a message that was checked."""


class LastUploads:
    """The newest prediction of each client for each proxy sample, kept in the server's state, so that it is resumed.

    Memory grows with the number of clients: for each client one prediction (and one row of features) per proxy sample,
    and its last prototypes. Kept only where an option needs it: uploads on change, personalised downloads.

    Args:
        server: keeps them in its state.
        expiry: number of rounds after which a prediction is forgotten; None for never.
    """

    def __init__(self, server: Server, expiry: int | None = None):
        self._server, self._expiry = server, expiry

    def keep(self, client: int, parts: Parts) -> None:
        """Store an accepted upload of this round, over earlier predictions for the same samples.

        Args:
            client: id of the sender.
            parts: the messages of its upload, by type.
        """
        said: Responses = parts[Responses]
        count, last = len(self._server.proxy), self._server.state.get("last", {})
        rows = torch.arange(count) if said.rows is None else said.rows
        before = last.get(str(client), {})
        logs = None if said.confidence is None else said.confidence.values().float()
        held: dict[str, Any] = {"round": self._server.round, "form": said.form, "samples": said.samples}
        held["since"] = _over(before.get("since"), rows, torch.full((len(rows),), self._server.round), count)
        held["values"] = _over(before.get("values"), rows, said.values.float(), count)
        held["logs"] = None if logs is None else _over(before.get("logs"), rows, logs, count)
        if Features in parts:
            own, seen = parts[Features], before.get("layers", {})
            places = torch.arange(count) if own.rows is None else own.rows
            held["layers"] = {
                name: _over(seen.get(name), places, values.float(), count) for name, values in own.layers.items()
            }
        if Prototypes in parts:
            own = parts[Prototypes]
            sure = torch.zeros(len(own.values)) if own.confidence is None else own.confidence.values().float()
            held["prototypes"] = {"values": own.values, "labels": own.labels, "counts": own.counts, "logs": sure}
        self._server.state["last"] = {**last, str(client): held}

    def round(self, client: int) -> int:
        """The round of the client's last accepted upload; 0 if it has none.

        Args:
            client: id of the client.
        """
        held = self._server.state.get("last", {}).get(str(client))
        return 0 if held is None else int(held["round"])

    def recall(self, client: int, round: int, rows: Tensor | None) -> Parts:
        """A client's last upload for some samples, as far as it has not expired.

        Args:
            client: id of the client, which has uploaded a status instead of predictions.
            round: round of its last accepted upload according to that status.
            rows: rows of the proxy set that clients predict now, int64 [m]; None for all.

        Raises:
            RejectedMessageError: its last upload is of another round, or has expired entirely.
        """
        if round == 0 or self.round(client) != round:
            held = self.round(client)
            raise RejectedMessageError(
                f"its answers of round {round} are not held, but {f'of {held}' if held else 'none'}"
            )
        parts = self._parts(self._server.state["last"][str(client)], rows)
        if parts is None:
            raise RejectedMessageError("what it has said of these samples has expired")
        return parts

    def all(self) -> dict[int, Parts]:
        """The last uploads of all clients, as far as they have not expired, in the order of ids."""
        last = self._server.state.get("last", {})
        parts = {int(client): self._parts(last[client], None) for client in sorted(last, key=int)}
        return {client: part for client, part in parts.items() if part is not None}

    def _parts(self, held: dict[str, Any], rows: Tensor | None) -> Parts | None:
        valid = held["since"] > 0
        if self._expiry is not None:
            valid &= held["since"] >= self._server.round - self._expiry
        chosen = torch.arange(len(valid)) if rows is None else rows
        chosen = chosen[valid[chosen]]
        if len(chosen) == 0:
            return None
        rows = None if len(chosen) == len(valid) else chosen
        sure = None if held["logs"] is None else ExactLogWeights(held["logs"][chosen])
        parts: Parts = {Responses: Responses(held["values"][chosen], held["form"], rows, sure, held["samples"])}
        if "layers" in held:
            parts[Features] = Features({name: values[chosen] for name, values in held["layers"].items()}, rows)
        if "prototypes" in held:
            own = held["prototypes"]
            parts[Prototypes] = Prototypes(own["values"], own["labels"], own["counts"], ExactLogWeights(own["logs"]))
        return parts


def _over(before: Tensor | None, rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Values of earlier rounds, overwritten by new ones in the given rows."""
    fits = before is not None and before.shape[1:] == values.shape[1:]
    whole = before.clone() if fits else values.new_zeros(count, *values.shape[1:])
    whole[rows] = values
    return whole
