"""Federated averaging of low-rank updates, with a choice of aggregations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.lora import Adapted, FedIT, LoraAggregation, low_rank_layers, merged
from fdl.knowledge.aggregation.lora_additions import additions_since, receive_additions, record_additions
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.messages import Message, Parameters
from fdl.methods.base import Method
from fdl.participants import Client, Server
from fdl.state.shards import is_sharded
from fdl.state.weights import load_into, module_state


class FedLoRA(Method):
    """Federated LoRA: sites train low-rank updates of a pretrained student, and the server aggregates them.

    The student needs ``tuning: lora``. Sites are weighted by their sample counts; the head and whatever else is trained
    besides the updates is averaged. If an aggregation adds to the original weights, server and sites keep the sum of
    additions as one dense float32 matrix per layer, 4 · out · in bytes, and the server up to as much again for factors.
    Each download carries the additions that the site has not confirmed: their factors, or, once these are the larger,
    the sum. Lossy codecs for downloads make the sites' weights differ from the server's by their rounding, which adds
    up over the rounds.

    Args:
        aggregation: ``"fedit"``, ``"ffa"``, ``"flora"``, ``"fedex"`` or ``"flexlora"``; None is ``"fedit"``.
    """

    name = "fedlora"
    sends = (Parameters,)

    def __init__(self, aggregation: LoraAggregation | None = None):
        self.aggregation = aggregation or FedIT()

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check that the student fits the aggregation, and start without additions to its weights."""
        if self.aggregation.merges and is_sharded(server.student):
            raise UserError(
                f"fabric.strategy: aggregation {self.aggregation.name} adds to the student's original weights, of "
                "which nobody has all under fsdp; take auto, or aggregation fedit, ffa or flexlora"
            )
        self.aggregation.check(low_rank_layers(server.student), module_state(server.student))
        if self.aggregation.merges:
            server.state["base"] = {"version": 0, "total": {}, "log": {}, "confirmed": {}}

    def download(self, server: Server, client: int) -> Message:
        """Return the updates and the head, one message for all sites that have confirmed the same additions."""
        confirmed = server.state["base"]["confirmed"].get(str(client), 0) if self.aggregation.merges else 0
        return server.cached_download(
            f"since {confirmed}", lambda: Parameters(self._global(server) | additions_since(server, confirmed))
        )

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train the updates on private data and return them."""
        template = client.runtime.shared_module("student")
        tensors = receive_additions(client, download.tensors)
        if self.aggregation.fresh:
            tensors |= _initial_factors(client, low_rank_layers(template), module_state(template))
        module = merged(client.load(tensors, "student"), client.state.get("base", {}).get("total", {}))
        yield FitRequest(module, client.train, client.local_training)
        return Parameters(module_state(module), samples=client.reported_samples)

    def aggregate(self, server: Server) -> _LoraUpdates:
        """Return an empty mean of all tensors, with each site's matrices if the aggregation needs them."""
        self.on_restore(server)
        return _LoraUpdates(server, self.aggregation.stacks)

    def server_update(self, server: Server, knowledge: _LoraUpdates) -> dict[str, float]:
        """Set the student to the aggregate."""
        mean = knowledge.mean.result()
        tensors = dict(mean.items())
        added: dict[str, dict[str, Tensor]] = {}
        total = sum(knowledge.samples)
        for layer in knowledge.layers if self.aggregation.stacks else ():
            combined = self.aggregation.combine(
                [site[layer.name] for site in knowledge.sites],
                [samples / total for samples in knowledge.samples],
                (tensors[layer.b], tensors[layer.a]),
                layer.scale,
            )
            tensors[layer.b], tensors[layer.a] = combined.factors
            if combined.update is not None:
                added[layer.name] = dict(zip(("left", "right"), combined.update))
        load_into(server.student, tensors)
        if self.aggregation.merges:
            server.state["base"] = record_additions(server.state["base"], added, knowledge.clients)
            self.on_restore(server)
        return {}

    def student_extra_state(self, server: Server) -> dict[str, Any]:
        """Return the additions to the student's original weights."""
        return {"base": {"total": server.state["base"]["total"]}} if self.aggregation.merges else {}

    def on_restore(self, server: Server) -> None:
        """Add the state's additions to the student's original weights, which are no part of checkpoints."""
        total = server.state.get("base", {}).get("total")
        if total is None or server.cache.get("merged") is total:
            return
        layers = low_rank_layers(server.student)
        pristine = server.cache.setdefault("pristine", {x.name: x.weight.to("cpu", copy=True) for x in layers})
        for layer in layers:
            addition = total.get(layer.name)
            layer.weight.copy_(pristine[layer.name] if addition is None else pristine[layer.name] + addition)
        server.cache["merged"] = total

    def _global(self, server: Server) -> dict[str, Tensor]:
        """Return the student's state, without factors if clients draw their own."""
        state = dict(module_state(server.student).items())
        if self.aggregation.fresh:
            for layer in low_rank_layers(server.student):
                del state[layer.a], state[layer.b]
        return state


class _LoraUpdates(Aggregate):
    """One round's uploads: a running mean, and copies of the low-rank matrices, 4 · r · (in + out) bytes per site."""

    def __init__(self, server: Server, stacks: bool):
        self.layers: list[Adapted] = low_rank_layers(server.student)
        self.mean, self.stacks = ParameterMean(module_state(server.student)), stacks
        self.sites: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.samples: list[int] = []
        self.clients: list[int] = []

    def add(self, message: Parameters, client: int) -> None:
        self.mean.add(message, client)
        self.clients.append(client)
        if self.stacks:
            copied = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in message.tensors.items()}
            self.sites.append({layer.name: (copied[layer.b], copied[layer.a]) for layer in self.layers})
            self.samples.append(message.samples)

    def result(self) -> _LoraUpdates | None:
        return self if self.clients else None


def _initial_factors(client: Client, layers: Sequence[Adapted], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draw LoRA's initial matrices: each entry of A uniform within ± 1/√in, and B = 0."""
    stream, tensors = client.rng("lora"), {}
    for layer in layers:
        a = torch.empty(like[layer.a].shape)
        tensors[layer.a] = a.uniform_(-(a.shape[1] ** -0.5), a.shape[1] ** -0.5, generator=stream)
        tensors[layer.b] = torch.zeros(like[layer.b].shape)
    return tensors
