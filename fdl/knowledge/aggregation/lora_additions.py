"""Additions to the original weights of a model with low-rank updates: the server's record and its downloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fdl.participants import Client, Server

_MERGE = "merge"


def _product(part: Mapping[str, Tensor]) -> Tensor:
    """Dense matrix [out, in] of an addition."""
    return part["left"] @ part["right"]


def _plus(total: Mapping[str, Tensor], added: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of all additions including a new one; the same operations at the server and at every client."""
    return dict(total) | {
        name: total[name] + _product(part) if name in total else _product(part) for name, part in added.items()
    }


def record_additions(
    base: dict[str, Any], added: dict[str, dict[str, Tensor]], senders: Sequence[int]
) -> dict[str, Any]:
    """The server's record after a round: clients that uploaded have confirmed all additions up to that round.

    Args:
        base: the record before the round.
        added: factors of the round's additions by layer; empty for none.
        senders: ids of the clients whose uploads were accepted.
    """
    known = base["confirmed"] | {str(client): base["version"] for client in senders}
    if not added:
        return {**base, "confirmed": known}
    version, total = base["version"] + 1, _plus(base["total"], added)
    log = base["log"] | {str(version): added}
    # older additions are sent as their sum, which is smaller
    dense = sum(tensor.numel() for tensor in total.values())
    while sum(t.numel() for entry in log.values() for part in entry.values() for t in part.values()) > dense:
        del log[min(log, key=int)]
    return {"version": version, "total": total, "log": log, "confirmed": known}


def additions_since(server: Server, known: int) -> dict[str, Tensor]:
    """The additions that a client has not confirmed, by ``merge/number/left or right or whole/layer``.

    Args:
        server: keeps the record in its state.
        known: version up to which the client has confirmed all additions.
    """
    base = server.state.get("base", {"version": 0})
    numbers = range(known + 1, base["version"] + 1)
    if all(str(number) in base["log"] for number in numbers):
        return {
            f"{_MERGE}/{number}/{side}/{layer}": tensor
            for number in numbers
            for layer, part in base["log"][str(number)].items()
            for side, tensor in part.items()
        }
    return {f"{_MERGE}/{base['version']}/whole/{layer}": tensor for layer, tensor in base["total"].items()}


def receive_additions(client: Client, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Record the additions that are new to a client in its state, and return all other downloaded tensors.

    Args:
        client: the client; its state keeps the sum of all additions.
        tensors: the download, by name.
    """
    rest: dict[str, Tensor] = {}
    additions: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{_MERGE}/"):
            _, number, side, layer = name.split("/", 3)
            additions.setdefault(int(number), {}).setdefault(layer, {})[side] = tensor
        else:
            rest[name] = tensor
    for number, added in sorted(additions.items()):
        base = client.state.get("base", {"version": 0, "total": {}})
        if number > base["version"]:
            whole = {layer: part["whole"] for layer, part in added.items() if "whole" in part}
            client.state["base"] = {"version": number, "total": whole or _plus(base["total"], added)}
    return rest
