"""Continual federated averaging that rehearses the past on public data, at clients and at the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.ensembles import MeanAndEnsemble
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.knowledge.aggregation.server_optimizers import ServerOptimizer
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.losses.responses import cross_entropy, kd_loss
from fdl.messages import Bundle, Message, Parameters, Responses, parts_of
from fdl.methods.fedavg import FedAvg
from fdl.modules.objectives import Objective, mean_over, samples_of
from fdl.modules.types import Batch
from fdl.participants import Client, Server
from fdl.robust.base import RobustRule
from fdl.robust.parameters import RobustParameters
from fdl.state.weights import module_state


class CFeD(FedAvg):
    """FedAvg that holds on to what the global model said before the newest data came (Ma et al., IJCAI 2022).

    When a stage of the recipe's `arrival` begins, the server notes the global model's answers to the proxy set. From
    then on a round's clients are divided: learners minimise CE on their private data, as in FedAvg, and reviewers, who
    are drawn anew in every round, λ T² KL(noted ‖ now) on the proxy set, with the recipe's `local_training` settings.
    Both count in the average by their numbers of private samples. Without a division every client minimises the sum of
    both losses, on as many proxy samples as private ones and over the classes that had arrived before this stage:
    learning without forgetting (Li and Hoiem, 2016) with public samples in the place of the private ones, which are
    gone.

    In every round, of the first stage too, the server then distils into the average what the clients' models and the
    global model before this round say of the proxy set, with the recipe's `server_distil` settings, against what one
    round's data do to the average: T² KL(mean_k softmax(z_k / T) ‖ softmax(z / T)). The published code asks for each
    sample one of these models in turn; the mean is what that amounts to.

    The published code has one proxy set for each participant, and 0.1 in the place of λ T².

    Args:
        weight: λ ≥ 0; with 0 nobody reviews.
        temperature: T > 0.
        optimizer: what the server does with the mean; None takes it as it is.
        robust: as in FedAvg; without `server_distillation`, which asks the models that it is to guard against.
        reviewers: share of a round's clients that review, in [0, 1); 0 divides nobody. A share that is no whole number
            of clients is met on average over rounds, and somebody always learns where there are two or more.
        server_distillation: whether the server distils as well.
    """

    name = "cfed"
    tasks = ("classification",)
    requires = ("student", "proxy")

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 2.0,
        optimizer: ServerOptimizer | None = None,
        robust: RobustRule | None = None,
        reviewers: float = 0.4,
        server_distillation: bool = True,
    ):
        super().__init__(optimizer, robust)
        if not weight >= 0:
            raise UserError(f"weight must be at least 0, got {weight}")
        if not temperature > 0:
            raise UserError(f"temperature must be > 0, got {temperature}")
        if not 0 <= reviewers < 1:
            raise UserError(f"reviewers must be a share of the clients in [0, 1), got {reviewers}")
        if robust is not None and server_distillation:
            raise UserError("robust guards the mean of weights alone: it needs server_distillation: false")
        self.weight, self.temperature = weight, temperature
        self.reviewers, self.server_distillation = reviewers, server_distillation

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """See that there are stages."""
        if server.arrival is None:
            raise UserError(f"method {self.name} needs an arrival: without stages there is nothing to forget")

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """The proxy set."""
        return {"proxy": server.proxy.nbytes}

    def download(self, server: Server, client: int) -> Message | Bundle:
        """The global weights and, from the second stage on, for those who review what they are to hold on to."""
        weights = super().download(server, client)
        if server.stage == 0 or self.weight == 0:
            return weights
        if server.state.get("noted_in") != server.stage:  # the first word of a stage: the weights are still the old
            server.state |= {"noted_in": server.stage, "noted": server.predict(server.student, server.proxy)}
        if self.reviewers > 0 and client not in self._reviewing(server):
            return weights
        return server.cached_download("both", lambda: Bundle((weights, Responses(server.state["noted"], "logits"))))

    def local_update(self, client: Client, download: Message | Bundle) -> Requests[Parameters]:
        """Train the global model on private data, on the noted answers, or on both; return its weights."""
        parts = parts_of(download)
        module = client.load(parts[Parameters].tensors, "student")
        noted = parts.get(Responses)
        if noted is not None and self.reviewers > 0:
            samples = SoftLabelled(client.proxy, noted.values)
            yield FitRequest(module, samples, client.local_training, self._reviewed, name="review")
        else:
            objective = None if noted is None else self._rehearsing(client, noted.values)
            yield FitRequest(module, client.train, client.local_training, objective)
        return Parameters(module_state(module), samples=client.reported_samples)

    def aggregate(self, server: Server) -> ParameterMean | RobustParameters | MeanAndEnsemble:
        """The mean as in FedAvg and, where the server distils, what all models say of the proxy set."""
        mean = super().aggregate(server)
        return MeanAndEnsemble(mean, server, self.temperature) if self.server_distillation else mean

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Move the global weights as in FedAvg, then distil into them what all models said."""
        if not self.server_distillation:
            return super().server_update(server, knowledge)
        mean, probabilities = knowledge
        log = super().server_update(server, mean)
        samples = SoftLabelled(server.proxy, probabilities)
        server.fit(server.student, samples, server.server_distil, self._distilled, name="distil")
        return log

    def _reviewing(self, server: Server) -> set[int]:
        """Who reviews in this round: the same on every process, whatever the order in which clients are asked."""
        cohort, stream = sorted(server.cohort), server.rng("reviewers")
        count = int(self.reviewers * len(cohort) + float(torch.rand((), generator=stream)))
        count = min(count, max(len(cohort) - 1, 1))
        return {cohort[i] for i in torch.randperm(len(cohort), generator=stream)[:count].tolist()}

    @mean_over(samples_of)
    def _reviewed(self, module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """What a reviewer minimises on proxy samples with the noted logits."""
        inputs, noted = batch
        soft = kd_loss(module(inputs).logits, torch.softmax(noted.float(), dim=1), self.temperature)
        return {"distillation": soft.detach(), "loss": self.weight * soft}

    def _rehearsing(self, client: Client, noted: Tensor) -> Objective:
        """What a client that does both minimises; proxy samples are drawn with replacement from their own stream."""
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

    @mean_over(samples_of)
    def _distilled(self, module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """What the server minimises; its targets are at temperature T already."""
        inputs, probabilities = batch
        logits = module(inputs).logits / self.temperature
        return {"loss": self.temperature**2 * kd_loss(logits, probabilities)}
