"""Continual federated averaging with rehearsal on public data, at clients and at the server."""

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
    """Continual FedAvg that preserves the global model's predictions from before the newest data (Ma et al., 2022).

    When a stage of the recipe's `arrival` begins, the server stores the global model's logits of the proxy set. From
    then on a round's clients are divided: learners minimise CE on their private data, as in FedAvg, and reviewers,
    drawn in each round, λ T² KL(previous ‖ now) on the proxy set, with the recipe's `local_training` settings.
    Both are weighted in the average by their numbers of private samples. Without a division each client minimises the
    sum of both losses, on as many proxy samples as private ones and over the classes that had arrived before this
    stage: learning without forgetting (Li and Hoiem, 2016) with public samples instead of the earlier private ones.

    In each round, of the first stage too, the server then distils the mean prediction of the clients' models and the
    previous global model on the proxy set into the average, with the recipe's `server_distil` settings, against what
    one round's data do to the average: T² KL(mean_k softmax(z_k / T) ‖ softmax(z / T)). The published code (IJCAI 2022)
    uses one of these models per sample in turn, of which the mean is the expectation. It also has one proxy set per
    participant, and 0.1 instead of λ T².

    Args:
        weight: λ ≥ 0; with 0 no client reviews.
        temperature: T > 0.
        optimizer: server optimiser, applied to the mean; None takes the mean as the new weights.
        robust: robust aggregation rule instead of the mean; None is the mean. Needs ``server_distillation: false``,
            since distillation would use the very models that the rule guards against.
        reviewers: fraction of a round's clients that review, in [0, 1); 0: no division. A fraction that is no whole
            number of clients is met on average over rounds; with two clients or more, one always learns.
        server_distillation: distil at the server as well.
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
        """Check that data arrive in stages."""
        if server.arrival is None:
            raise UserError(f"method {self.name} needs an arrival: without stages there is nothing to forget")

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Return the bytes of the proxy set."""
        return {"proxy": server.proxy.nbytes}

    def download(self, server: Server, client: int) -> Message | Bundle:
        """Return the global weights and, for reviewers from the second stage on, the previous stage's logits."""
        weights = super().download(server, client)
        if server.stage == 0 or self.weight == 0:
            return weights
        if server.state.get("logits_stage") != server.stage:  # first download of a stage: the weights are still the old
            logits = server.predict(server.student, server.proxy)
            server.state |= {"logits_stage": server.stage, "previous_logits": logits}
        if self.reviewers > 0 and client not in self._reviewers(server):
            return weights
        return server.cached_download(
            "both", lambda: Bundle((weights, Responses(server.state["previous_logits"], "logits")))
        )

    def local_update(self, client: Client, download: Message | Bundle) -> Requests[Parameters]:
        """Train the global model on private data, on the previous predictions, or on both; return its weights."""
        parts = parts_of(download)
        module = client.load(parts[Parameters].tensors, "student")
        previous = parts.get(Responses)
        if previous is not None and self.reviewers > 0:
            samples = SoftLabelled(client.proxy, previous.values)
            yield FitRequest(module, samples, client.local_training, self._review_loss, name="review")
        else:
            objective = None if previous is None else self._rehearsal_objective(client, previous.values)
            yield FitRequest(module, client.train, client.local_training, objective)
        return Parameters(module_state(module), samples=client.reported_samples)

    def aggregate(self, server: Server) -> ParameterMean | RobustParameters | MeanAndEnsemble:
        """Return FedAvg's aggregate and, if the server distils, all models' mean prediction of the proxy set."""
        mean = super().aggregate(server)
        return MeanAndEnsemble(mean, server, self.temperature) if self.server_distillation else mean

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Update the global weights as FedAvg does, then distil the models' mean prediction into them."""
        if not self.server_distillation:
            return super().server_update(server, knowledge)
        mean, probabilities = knowledge
        log = super().server_update(server, mean)
        samples = SoftLabelled(server.proxy, probabilities)
        server.fit(server.student, samples, server.server_distil, self._distillation_loss, name="distil")
        return log

    def _reviewers(self, server: Server) -> set[int]:
        """Return the ids of this round's reviewers, the same in each process and for any order of clients."""
        cohort, stream = sorted(server.cohort), server.rng("reviewers")
        count = int(self.reviewers * len(cohort) + float(torch.rand((), generator=stream)))
        count = min(count, max(len(cohort) - 1, 1))
        return {cohort[i] for i in torch.randperm(len(cohort), generator=stream)[:count].tolist()}

    @mean_over(samples_of)
    def _review_loss(self, module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return a reviewer's loss on proxy samples with the previous logits."""
        inputs, previous = batch
        soft = kd_loss(module(inputs).logits, torch.softmax(previous.float(), dim=1), self.temperature)
        return {"distillation": soft.detach(), "loss": self.weight * soft}

    def _rehearsal_objective(self, client: Client, previous: Tensor) -> Objective:
        """Return the sum of both losses; proxy samples are drawn with replacement from their own stream."""
        known = torch.tensor(client.arrival.known_classes(client.stage - 1, client.num_classes))
        targets, stream = torch.softmax(previous[:, known].float(), dim=1), client.rng("rehearse")

        def objective(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
            inputs, labels = batch
            hard = cross_entropy(module(inputs).logits, labels)
            rows = torch.randint(len(targets), (len(labels),), generator=stream)
            public = client.proxy.batch(rows)[0].to(inputs)
            logits = module(public).logits[:, known.to(labels.device)]
            soft = kd_loss(logits, targets[rows].to(labels.device), self.temperature)
            parts = {"cross_entropy": hard.detach(), "distillation": soft.detach()}
            return {**parts, "loss": hard + self.weight * soft}

        return objective

    @mean_over(samples_of)
    def _distillation_loss(self, module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the server's loss; its targets are at temperature T already."""
        inputs, probabilities = batch
        logits = module(inputs).logits / self.temperature
        return {"loss": self.temperature**2 * kd_loss(logits, probabilities)}
