"""FedAvg whose average is refined by distilling the clients' ensemble into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fdl.errors import RefusedError
from fdl.knowledge.aggregation import ParameterMean
from fdl.knowledge.targets import Answered, ResponseObjective
from fdl.messages import Message, Parameters
from fdl.methods.base import Method
from fdl.modules.weights import load_into, state_of
from fdl.participants import Client, Server, copy_of
from fdl.seeding import stream_seed


class FedDF(Method):
    """Average the clients' weights, then distil the mean of their logits into the average (Lin et al., 2020).

    KL(softmax(mean_k f(x_k)) ‖ softmax(f(x))) on the proxy set at temperature 1, teachers weighted alike. With
    specialists of several architectures there is one group an architecture: each is averaged by itself and then taught
    by all clients. The recipe's student then is one more group, which has no clients and is taught only.

    Args:
        architectures: whether clients train the student's architecture or their own specialists'.
    """

    name = "feddf"
    tasks = ("classification",)
    requires = ("student", "proxy")

    def __init__(self, architectures: Literal["student", "specialists"] = "student"):
        self.heterogeneous = architectures == "specialists"
        if self.heterogeneous:
            self.requires = (*self.requires, "specialists")

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Draw first weights for every architecture that clients train."""
        if self.heterogeneous:
            server.state["groups"] = {
                a: server.runtime.first_weights(a, stream_seed(server.seed, f"init/{a}"))
                for a in sorted({client.architecture for client in clients})
            }
            server.state["members"] = {str(client.id): client.architecture for client in clients}

    def download(self, server: Server, client: int) -> Message:
        """The weights of the client's group, one message for all clients of it."""
        group = self._group(server, client)
        return server.say(group, lambda: Parameters(self._weights(server, group)))

    def local_update(self, client: Client, download: Parameters) -> Parameters:
        """Train the group's model on private data and return its weights."""
        module = client.load(download.tensors, client.architecture if self.heterogeneous else "student")
        client.fit(module, client.train, client.local)
        return Parameters(state_of(module), samples=client.told_samples)

    def aggregate(self, server: Server) -> _Ensemble:
        """Means of the weights by group, and of all clients' logits."""
        return _Ensemble(self, server)

    def server_update(self, server: Server, knowledge: tuple[dict[str, Any], Tensor]) -> dict[str, float]:
        """Put every group on its average, then teach it by all."""
        averages, logits = knowledge
        samples = Answered(server.proxy, torch.softmax(logits, dim=1))
        objective = ResponseObjective("kl", 1.0)
        for group, tensors in averages.items():
            if group != "student":
                module = server.runtime.template(group)
                load_into(module, tensors)
                server.fit(module, samples, server.distil, objective, name=f"distil/{group}")
                server.state["groups"][group] = copy_of(module)
        if "student" in averages:
            load_into(server.student, averages["student"])
        server.fit(server.student, samples, server.distil, objective, name="distil")
        return {}

    def _group(self, server: Server, client: int) -> str:
        return server.state["members"][str(client)] if self.heterogeneous else "student"

    def _weights(self, server: Server, group: str) -> dict[str, Tensor]:
        return state_of(server.student) if group == "student" else server.state["groups"][group]


class _Ensemble:
    """Streams over clients: each one's weights answer the proxy set, then go into their group's mean."""

    def __init__(self, method: FedDF, server: Server):
        self.method, self.server = method, server
        self.means: dict[str, ParameterMean] = {}
        self.logits: Tensor | None = None
        self.count = 0

    def add(self, message: Parameters, client: int) -> None:
        group = self.method._group(self.server, client)
        module = self.server.runtime.template(group)
        try:
            load_into(module, message.tensors)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        self.server.runtime.hold(group, None)
        logits = self.server.predict(module, self.server.proxy)
        if not torch.isfinite(logits).all():
            raise RefusedError("its model's answers to the proxy set are not finite")
        if group not in self.means:
            self.means[group] = ParameterMean(self.method._weights(self.server, group))
        self.means[group].add(message, client)
        self.logits = logits if self.logits is None else self.logits + logits
        self.count += 1

    def result(self) -> tuple[dict[str, Any], Tensor] | None:
        if self.logits is None:
            return None
        return {group: mean.result() for group, mean in self.means.items()}, self.logits / self.count
