"""Last uploads of each client, kept by the server if an option needs them."""

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
    """Unquantised log-weights, instead of `QuantizedLogWeights` if nothing is transmitted.

    Attributes:
        logs: float32 [n].
    """

    logs: Tensor

    def values(self) -> Tensor:
        """Return the log-weights."""
        return self.logs

    def validate(self) -> None:
        """Do nothing: the log-weights come from a message that was checked."""


class LastUploads:
    """Newest prediction of each client for each proxy sample, in the server's state, so that it survives a restart.

    Memory grows with the number of clients: per client, one prediction (and one row of features) per proxy sample, and
    its last prototypes. They are kept only if an option needs them: uploads on change, personal downloads.

    Args:
        server: the server, whose state keeps the uploads.
        expiry: rounds after which a prediction is dropped; None for never.
    """

    def __init__(self, server: Server, expiry: int | None = None):
        self._server, self._expiry = server, expiry

    def keep(self, client: int, parts: Parts) -> None:
        """Store an accepted upload of this round over earlier predictions of the same samples.

        Args:
            client: id of the sender.
            parts: the upload's messages by type, among them `Responses`.
        """
        responses: Responses = parts[Responses]
        count, last = len(self._server.proxy), self._server.state.get("last_uploads", {})
        rows = torch.arange(count) if responses.rows is None else responses.rows
        before = last.get(str(client), {})
        logs = None if responses.confidence is None else responses.confidence.values().float()
        upload: dict[str, Any] = {
            "round": self._server.round,
            "form": responses.form,
            "samples": responses.samples,
            "rounds": _over(before.get("rounds"), rows, torch.full((len(rows),), self._server.round), count),
            "values": _over(before.get("values"), rows, responses.values.float(), count),
            "logs": None if logs is None else _over(before.get("logs"), rows, logs, count),
        }
        if Features in parts:
            features, layers = parts[Features], before.get("layers", {})
            places = torch.arange(count) if features.rows is None else features.rows
            upload["layers"] = {
                name: _over(layers.get(name), places, values.float(), count) for name, values in features.layers.items()
            }
        if Prototypes in parts:
            own = parts[Prototypes]
            logs = torch.zeros(len(own.values)) if own.confidence is None else own.confidence.values().float()
            upload["prototypes"] = {"values": own.values, "labels": own.labels, "counts": own.counts, "logs": logs}
        self._server.state["last_uploads"] = {**last, str(client): upload}

    def round(self, client: int) -> int:
        """Return the round of the client's last accepted upload, 0 if there is none.

        Args:
            client: id of the client.
        """
        upload = self._server.state.get("last_uploads", {}).get(str(client))
        return 0 if upload is None else int(upload["round"])

    def recall(self, client: int, round: int, rows: Tensor | None) -> Parts:
        """Return a client's stored predictions of some samples that have not expired, as messages by type.

        Args:
            client: id of a client that reports that nothing has changed.
            round: round of its last accepted upload, according to the client.
            rows: rows of the proxy set that are needed, None for all.

        Raises:
            RejectedMessageError: its last upload was in another round, or all of it has expired.
        """
        if round == 0 or self.round(client) != round:
            held = self.round(client)
            raise RejectedMessageError(
                f"its answers of round {round} are not held, but {f'of {held}' if held else 'none'}"
            )
        parts = self._parts(self._server.state["last_uploads"][str(client)], rows)
        if parts is None:
            raise RejectedMessageError("what it has said of these samples has expired")
        return parts

    def all(self) -> dict[int, Parts]:
        """Return the stored uploads of all clients that have not expired, by client, in the order of ids."""
        last = self._server.state.get("last_uploads", {})
        parts = {int(client): self._parts(last[client], None) for client in sorted(last, key=int)}
        return {client: part for client, part in parts.items() if part is not None}

    def _parts(self, upload: dict[str, Any], rows: Tensor | None) -> Parts | None:
        """Return a stored upload as messages by type, None if it has no valid row."""
        valid = upload["rounds"] > 0
        if self._expiry is not None:
            valid &= upload["rounds"] >= self._server.round - self._expiry
        chosen = torch.arange(len(valid)) if rows is None else rows
        chosen = chosen[valid[chosen]]
        if len(chosen) == 0:
            return None
        rows = None if len(chosen) == len(valid) else chosen
        weights = None if upload["logs"] is None else ExactLogWeights(upload["logs"][chosen])
        responses = Responses(upload["values"][chosen], upload["form"], rows, weights, upload["samples"])
        parts: Parts = {Responses: responses}
        if "layers" in upload:
            parts[Features] = Features({name: values[chosen] for name, values in upload["layers"].items()}, rows)
        if "prototypes" in upload:
            own = upload["prototypes"]
            parts[Prototypes] = Prototypes(own["values"], own["labels"], own["counts"], ExactLogWeights(own["logs"]))
        return parts


def _over(before: Tensor | None, rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Return earlier rounds' values, overwritten with new ones in the given rows."""
    fits = before is not None and before.shape[1:] == values.shape[1:]
    whole = before.clone() if fits else values.new_zeros(count, *values.shape[1:])
    whole[rows] = values
    return whole
