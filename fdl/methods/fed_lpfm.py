"""Federated learning of a light proxy model that frozen foundation models teach at each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from fdl.engine.requests import FitRequest, PredictRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.pools import architectures
from fdl.knowledge.aggregation.server_optimizers import ServerOptimizer
from fdl.knowledge.distillation.cost_model import prediction_flops, samples_seen, training_flops, weight_bytes
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.losses.responses import RESPONSE_LOSSES, cross_entropy
from fdl.messages import Parameters
from fdl.methods.fedavg import FedAvg
from fdl.participants import Client, Server, copy_of
from fdl.robust.base import RobustRule
from fdl.state.weights import load_into, module_state


class FedLPFM(FedAvg):
    """FedAvg of a small proxy model that the client's frozen foundation models teach (arXiv 2311.08479).

    The recipe's specialists are the foundation models and its student is the proxy. Each client trains the proxy on
    its own data for (1 − λ) CE + λ T² KL(p ‖ proxy), where p is the mean prediction of its foundation models, and
    uploads the proxy's weights; only these are averaged, by sample counts, and used afterwards. Foundation models
    predict the client's images once, without augmentation; in memory the predictions take one row of C numbers per
    sample. The models must cover the classes: classifiers pretrained for the same ones, or models that compare images
    with the classes' names.

    Args:
        weight: λ, the foundation models' share of the loss, in [0, 1]; 0 is FedAvg.
        temperature: T > 0.
        loss: loss between proxy and foundation models, a name among `fdl.losses.responses.RESPONSE_LOSSES`. Losses
            between logits take the mean of logits for p.
        models: foundation models per client, ≥ 1: its own entry of the specialists and those that follow it.
        fine_tune: train each site's copies on its own data before they predict, with the `local_training` settings:
            once, or, where data arrive in stages, once per stage from the public weights.
        optimizer: server optimiser, applied to the mean; None takes the mean as the new weights.
        robust: robust aggregation rule instead of the mean; None is the mean.
    """

    name = "fed_lpfm"
    tasks = ("classification",)
    requires = ("student", "specialists")

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 1.0,
        loss: str = "kl",
        models: int = 1,
        fine_tune: bool = False,
        optimizer: ServerOptimizer | None = None,
        robust: RobustRule | None = None,
    ):
        super().__init__(optimizer, robust)
        if not 0 <= weight <= 1:
            raise UserError(f"weight must be in [0, 1], got {weight}")
        if not temperature > 0:
            raise UserError(f"temperature must be > 0, got {temperature}")
        if loss not in RESPONSE_LOSSES:
            raise UserError(f"loss must be one of {', '.join(RESPONSE_LOSSES)}, got {loss!r}")
        if models < 1:
            raise UserError(f"models must be at least 1, got {models}")
        self.weight, self.temperature, self.loss = weight, temperature, RESPONSE_LOSSES[loss]
        self.models, self.fine_tune = models, fine_tune

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check that there are as many foundation models as each client is to hold."""
        known = architectures(server.runtime)
        if self.models > len(known):
            raise UserError(f"models: {self.models} at a client, but specialists has {len(known)} different ones")

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train the proxy on private labels and on the foundation models' predictions; return its weights."""
        if self.weight == 0 or client.runtime.is_dry_run:  # a dry run measures messages, which predictions leave alone
            return (yield from super().local_update(client, download))
        with client.data_gate.open():  # predictions of a sample are used in the fit with that sample, and nowhere else
            predictions = yield from self._teacher_predictions(client)
            proxy = client.load(download.tensors, "student")
            client.metrics.update(self._costs(client, proxy))
            labelled = SoftLabelled(client.train, client.train.labels, more=[predictions])
        yield FitRequest(proxy, labelled, client.local_training, self._loss)
        return Parameters(module_state(proxy), samples=client.reported_samples)

    def _loss(self, proxy: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        inputs, labels, targets = batch
        logits = proxy(inputs).logits
        hard, soft = cross_entropy(logits, labels), self.loss(logits, targets, self.temperature)
        parts = {"cross_entropy": hard.detach(), "distillation": soft.detach()}
        return {**parts, "loss": (1 - self.weight) * hard + self.weight * soft}

    def _teacher_predictions(self, client: Client) -> Requests[Tensor]:
        """Return the foundation models' mean prediction of each private sample, [n, C].

        Predictions of public models are computed again after a restart; those of fine-tuned ones are saved, instead of
        their weights. Either holds for the samples of one stage.
        """
        kept = client.state if self.fine_tune else client.cache
        if kept.get("predictions_stage") != client.stage:
            predictions = []
            for number, architecture in enumerate(self._architectures(client)):
                predictions.append((yield from self._teacher_logits(client, number, architecture)))
            logits = torch.stack(predictions)
            kept["predictions"] = (logits if self.loss.form == "logits" else torch.softmax(logits, dim=2)).mean(0)
            kept["predictions_stage"] = client.stage
        return kept["predictions"]

    def _teacher_logits(self, client: Client, number: int, architecture: str) -> Requests[Tensor]:
        """Return one foundation model's logits of the private samples, fine-tuned on them first if configured.

        The shared module has its public weights again afterwards.
        """
        with client.modules.borrow(architecture) as module:
            if not self.fine_tune:
                return (yield PredictRequest(module, client.train))
            public = copy_of(module)
            yield FitRequest(module, client.train, client.local_training, name=f"fine_tune/{number}")
            logits = yield PredictRequest(module, client.train)
            load_into(module, public)
            return logits

    def _architectures(self, client: Client) -> list[str]:
        """Return the architectures of the client's foundation models."""
        known = architectures(client.runtime)
        first = known.index(client.architecture)
        return [known[(first + i) % len(known)] for i in range(self.models)]

    def _models(self, client: Client) -> list[LightningModule]:
        """Return the client's foundation models with their public weights."""
        return [client.runtime.shared_module(name) for name in self._architectures(client)]

    def _costs(self, client: Client, proxy: LightningModule) -> dict[str, float]:
        """Return FLOPs of a round's training, of the foundation models (once), of one prediction, and model sizes."""
        if "costs" not in client.cache:
            models, count = self._models(client), client.samples
            seen = samples_seen(count, client.local_training)
            tuning = seen * sum(training_flops(client, module) for module in models) if self.fine_tune else 0
            client.cache["costs"] = {
                "flops/training_a_round": float(seen * training_flops(client, proxy)),
                "flops/foundation_models_once": float(
                    count * sum(prediction_flops(client, m) for m in models) + tuning
                ),
                "flops/proxy_an_answer": float(prediction_flops(client, proxy)),
                "bytes/foundation_models": float(sum(weight_bytes(module) for module in models)),
                "bytes/proxy": float(weight_bytes(proxy)),
            }
        return client.cache["costs"]
