"""FedGKT: clients train small feature extractors, the server a large model on the features of their private samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from fdl.datamodules.samples import TensorSamples
from fdl.engine.requests import FitRequest, Requests
from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.pools import architectures
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.losses.responses import cross_entropy, kd_loss
from fdl.messages import Responses
from fdl.messages.private_features import PrivateFeatures
from fdl.methods.base import Method
from fdl.modules.output import Output
from fdl.participants import Client, Server, copy_of
from fdl.state.weights import load_into
from fdl.utils.arguments import not_negative, positive


class FedGKT(Method):
    """Group knowledge transfer: split training without waiting for gradients (He et al., 2020).

    **Not privacy-neutral**: features, logits and *labels of every private sample* leave the site in every round, which
    the ledger counts as ``private_features``; features of early layers can be inverted to images. The method is a
    reference for partners who may see each other's data but cannot train a large model.

    A client trains its specialist, a feature extractor with a small classification layer, on its private data for
    CE + w T² KL(server ‖ client), then uploads the output of its layer `layer` for each private sample. The server
    trains the recipe's `teacher`, whose inputs are these features, for CE + w T² KL(client ‖ server) with the recipe's
    `server_distil` settings, and sends back its logits of the client's samples. Inference also sends features to the
    server: the model that is evaluated as a client's is its extractor with the server's model on top.

    Args:
        layer: dotted name of the layer of all specialists' networks whose output is sent; None is the embedding. The
            teacher's argument `input_shape` must be its shape, e.g. [64, 1, 1] for an embedding of 64.
        weight: w ≥ 0, of both distillation terms.
        temperature: T > 0.
    """

    name = "fedgkt"
    sends = (PrivateFeatures,)
    tasks = ("classification",)
    requires = ("specialists", "teacher")

    def __init__(self, layer: str | None = None, weight: float = 1.0, temperature: float = 1.0):
        self.layer = layer
        self.weight, self.temperature = not_negative("weight", weight), positive("temperature", temperature)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check that the server's model takes the extractors' features, and keep its first weights."""
        one = server.test.subset(torch.tensor([0]))
        shape = server.teacher.input_shape
        for key in architectures(server.runtime):
            width = server.predict(server.runtime.shared_module(key), one, self._features).shape[1]
            if shape is not None and prod(shape) != width:
                raise UserError(
                    f"teacher: takes inputs of {list(shape)}, but {key} sends {width} features; "
                    f"set teacher.args.input_shape to their shape, e.g. [{width}, 1, 1]"
                )
        server.state["teacher"] = copy_of(server.teacher)

    def download(self, server: Server, client: int) -> Responses | None:
        """Return the server's logits of the client's own samples; None before the client's first upload."""
        logits = server.state.get("predictions", {}).get(str(client))
        return None if logits is None else Responses(logits, "logits")

    def local_update(self, client: Client, download: Responses | None) -> Requests[PrivateFeatures]:
        """Train on labels and the server's logits; upload features, logits and labels."""
        specialist = client.specialist()
        samples, objective = client.train, None
        if download is not None and self.weight > 0:
            samples, objective = SoftLabelled(client.train, client.train.labels, more=[download.values]), self._loss
        yield FitRequest(specialist, samples, client.local_training, objective)
        client.save_specialist(specialist)
        features, logits = (client.predict(specialist, client.train, what) for what in (self._features, "logits"))
        return PrivateFeatures(features, logits, client.train.labels)

    def aggregate(self, server: Server) -> _FeatureCollection:
        """Return an empty collection of the round's features: memory grows with the number of private samples."""
        shape = server.teacher.input_shape
        return _FeatureCollection(server.num_classes, None if shape is None else prod(shape))

    def server_update(self, server: Server, knowledge: Mapping[int, PrivateFeatures]) -> dict[str, float]:
        """Train the server's model on all features, and predict them."""
        uploads = [knowledge[client] for client in sorted(knowledge)]
        parts = ("features", "logits", "labels")
        features, logits, labels = (torch.cat([getattr(upload, part) for upload in uploads]) for part in parts)
        samples = SoftLabelled(TensorSamples(self._reshape(server.teacher, features)), labels, more=[logits])
        load_into(server.teacher, server.state["teacher"])
        server.fit(server.teacher, samples, server.server_distil, self._loss, name="distil")
        server.state["teacher"] = copy_of(server.teacher)
        predictions = server.predict(server.teacher, samples).split([len(upload.labels) for upload in uploads])
        new = {str(client): logits.clone() for client, logits in zip(sorted(knowledge), predictions)}
        server.state["predictions"] = server.state.get("predictions", {}) | new
        return {}

    def client_model(self, server: Server, client: Client) -> nn.Module:
        """Return the client's extractor with the server's model on top."""
        load_into(server.teacher, server.state["teacher"])
        return _SplitModel(self, client.specialist(), server.teacher)

    def _loss(self, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        inputs, labels, targets = batch
        logits = module(inputs).logits
        hard = cross_entropy(logits, labels)
        soft = kd_loss(logits, torch.softmax(targets, dim=1), self.temperature)
        parts = {"cross_entropy": hard.detach(), "distillation": soft.detach()}
        return {**parts, "loss": hard + self.weight * soft}

    def _features(self, module: nn.Module, inputs: Any) -> Tensor:
        """Return the features of a batch that are sent, [B, d]."""
        if self.layer is None:
            return module(inputs).embedding
        return module(inputs, features=(self.layer,)).features[self.layer].flatten(1)

    def _reshape(self, tail: nn.Module, features: Tensor) -> Tensor:
        return features if tail.input_shape is None else features.view(len(features), *tail.input_shape)


class _SplitModel(nn.Module):
    """A client's extractor followed by the server's model."""

    def __init__(self, method: FedGKT, extractor: LightningModule, tail: LightningModule):
        super().__init__()
        self.method, self.extractor, self.tail = method, extractor, tail

    def forward(self, inputs: Any) -> Output:
        return self.tail(self.method._reshape(self.tail, self.method._features(self.extractor, inputs)))


class _FeatureCollection(Aggregate):
    """All clients' features, logits and labels of one round."""

    def __init__(self, num_classes: int, width: int | None):
        self.num_classes, self.width = num_classes, width
        self.messages: dict[int, PrivateFeatures] = {}

    def add(self, message: PrivateFeatures, client: int) -> None:
        if not isinstance(message, PrivateFeatures):
            raise RejectedMessageError(f"expected private features, got {message.kind}")
        message.validate()
        columns, classes = message.logits.shape[1], int(message.labels.max()) + 1 if len(message.labels) else 0
        if columns != self.num_classes or classes > self.num_classes:
            raise RejectedMessageError(
                f"expected logits and labels of {self.num_classes} classes, got {columns}, {classes}"
            )
        if self.width is not None and message.features.shape[1] != self.width:
            raise RejectedMessageError(f"expected features [n, {self.width}], got {list(message.features.shape)}")
        self.messages[client] = message

    def result(self) -> dict[int, PrivateFeatures] | None:
        return self.messages or None
