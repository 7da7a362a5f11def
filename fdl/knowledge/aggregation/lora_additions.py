"""Additions to the original weights of a model with low-rank updates: the server's record, and its downloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fdl.participants import Client, Server

_MERGE = "merge"


def _product(part: Mapping[str, Tensor]) -> Tensor:
    """The dense matrix, [out, in], that an addition stands for."""
    return part["left"] @ part["right"]


def _plus(total: Mapping[str, Tensor], added: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of all additions after another one; the same operations at the server and at every site."""
    return dict(total) | {
        name: total[name] + _product(part) if name in total else _product(part) for name, part in added.items()
    }


def record_additions(base: dict[str, Any], added: dict[str, dict[str, Tensor]], heard: Sequence[int]) -> dict[str, Any]:
    """The server's record after a round: sites that were heard have confirmed all additions up to that round."""
    known = base["confirmed"] | {str(client): base["version"] for client in heard}
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
    """The additions that a site has not confirmed, by ``merge/number/left or right or whole/layer``."""
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


def take_in_additions(client: Client, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Note in a site's state the additions that are new to it; returns all else that was sent."""
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
