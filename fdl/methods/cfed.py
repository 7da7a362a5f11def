"""Continual federated averaging that rehearses the past on public data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.losses import cross_entropy, kd_loss
from fdl.messages import Bundle, Message, Parameters, Responses, parts_of
from fdl.methods.fedavg import FedAvg
from fdl.modules.weights import state_of
from fdl.objectives import Objective
from fdl.participants import Client, Server
from fdl.robust.base import Rule
from fdl.server_optimizers import ServerOptimizer


class CFeD(FedAvg):
    """FedAvg whose clients hold on to what the global model said before the newest data came (Ma et al., 2022).

    When a stage of the recipe's `arrival` begins, the server notes the global model's answers to the proxy set. From
    then on clients minimise CE on their own batch plus λ T² KL(noted ‖ now) on as many proxy samples, over the classes
    that had arrived before this stage: learning without forgetting (Li and Hoiem, 2016) with public samples in the
    place of the private ones, which are gone. In the first stage, and with λ = 0, this is FedAvg.

    Args:
        weight: λ ≥ 0.
        temperature: T > 0.
        optimizer: what the server does with the mean; None takes it as it is.
        robust: as in FedAvg.
    """

    name = "cfed"
    tasks = ("classification",)
    requires = ("student", "proxy")

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 2.0,
        optimizer: ServerOptimizer | None = None,
        robust: Rule | None = None,
    ):
        super().__init__(optimizer, robust)
        if not weight >= 0:
            raise UserError(f"weight must be at least 0, got {weight}")
        if not temperature > 0:
            raise UserError(f"temperature must be > 0, got {temperature}")
        self.weight, self.temperature = weight, temperature

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """See that there are stages."""
        if server.arrival is None:
            raise UserError(f"method {self.name} needs an arrival: without stages there is nothing to forget")

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """The proxy set."""
        return {"proxy": server.proxy.nbytes}

    def download(self, server: Server, client: int) -> Message | Bundle:
        """The global weights and, from the second stage on, what they are to hold on to."""
        weights = super().download(server, client)
        if server.stage == 0 or self.weight == 0:
            return weights
        if server.state.get("noted_in") != server.stage:  # the first word of a stage: the weights are still the old
            server.state |= {"noted_in": server.stage, "noted": server.predict(server.student, server.proxy)}
        return server.say("both", lambda: Bundle((weights, Responses(server.state["noted"], "logits"))))

    def local_update(self, client: Client, download: Message | Bundle) -> Parameters:
        """Train the global model on private data without letting go of the noted answers; return its weights."""
        parts = parts_of(download)
        module = client.load(parts[Parameters].tensors, "student")
        noted = parts.get(Responses)
        objective = None if noted is None else self._rehearsing(client, noted.values)
        client.fit(module, client.train, client.local, objective)
        return Parameters(state_of(module), samples=client.told_samples)

    def _rehearsing(self, client: Client, noted: Tensor) -> Objective:
        """What a client minimises; proxy samples are drawn with replacement from a stream of their own."""
        known = torch.tensor(client.arrival.known_classes(client.stage - 1, client.num_classes))
        answers, stream = torch.softmax(noted[:, known].float(), dim=1), client.rng("rehearse")

        def objective(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
            inputs, labels = batch
            hard = cross_entropy(module(inputs).logits, labels)
            rows = torch.randint(len(answers), (len(labels),), generator=stream)
            public = client.proxy.batch(rows)[0].to(inputs)
            logits = module(public).logits[:, known.to(labels.device)]
            soft = kd_loss(logits, answers[rows].to(labels.device), self.temperature)
            parts = {"cross_entropy": hard.detach(), "distillation": soft.detach()}
            return {**parts, "loss": hard + self.weight * soft}

        return objective
