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
    """Split training without waiting for gradients: group knowledge transfer (He et al., 2020).

    **Not privacy-neutral**: features, logits and *labels of every private sample* leave the site in every round, which
    the ledger counts as ``private_features``; features of early layers can be turned back into images. It is here as a
    point of comparison, for partners who may see each other's data but cannot train a large model.

    A client trains its specialist, a feature extractor with a small classification layer, on its private data for
    CE + w T² KL(server ‖ client), then sends what its layer `layer` gives for each private sample. The server trains
    the recipe's `teacher`, which takes these features for inputs, for CE + w T² KL(client ‖ server) with the recipe's
    `server_distil` settings, and returns its logits of the client's samples. Who uses the result sends features to the
    server: the model that is evaluated as a client's is its extractor with the server's model on top.

    Args:
        layer: dotted name of the layer of all specialists' networks whose output is sent; None is the embedding. The
            teacher's argument `input_shape` must say its shape, e.g. [64, 1, 1] for an embedding of 64.
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
        """See that the server's model takes what extractors give, and keep its first weights."""
        one = server.test.subset(torch.tensor([0]))
        shape = server.teacher.input_shape
        for key in architectures(server.runtime):
            width = server.predict(server.runtime.shared_module(key), one, self._features).shape[1]
            if shape is not None and prod(shape) != width:
                raise UserError(
                    f"teacher: takes inputs of {list(shape)}, but {key} sends {width} features; "
                    f"set teacher.args.input_shape to their shape, e.g. [{width}, 1, 1]"
                )
        server.state["tail"] = copy_of(server.teacher)

    def download(self, server: Server, client: int) -> Responses | None:
        """The server's logits of the client's own samples, None before it has seen any."""
        answers = server.state.get("answers", {}).get(str(client))
        return None if answers is None else Responses(answers, "logits")

    def local_update(self, client: Client, download: Responses | None) -> Requests[PrivateFeatures]:
        """Train on labels and on what the server says of them; send features, logits and labels."""
        specialist = client.specialist()
        samples, objective = client.train, None
        if download is not None and self.weight > 0:
            samples, objective = SoftLabelled(client.train, client.train.labels, more=[download.values]), self._taught
        yield FitRequest(specialist, samples, client.local_training, objective)
        client.save_specialist(specialist)
        features, logits = (client.predict(specialist, client.train, what) for what in (self._features, "logits"))
        return PrivateFeatures(features, logits, client.train.labels)

    def aggregate(self, server: Server) -> _Everything:
        """All features of the round: memory grows with the number of private samples."""
        shape = server.teacher.input_shape
        return _Everything(server.num_classes, None if shape is None else prod(shape))

    def server_update(self, server: Server, knowledge: Mapping[int, PrivateFeatures]) -> dict[str, float]:
        """Train the server's model on all features, and let it answer them."""
        said = [knowledge[client] for client in sorted(knowledge)]
        features, logits, labels = (torch.cat([getattr(m, k) for m in said]) for k in ("features", "logits", "labels"))
        samples = SoftLabelled(TensorSamples(self._shaped(server.teacher, features)), labels, more=[logits])
        load_into(server.teacher, server.state["tail"])
        server.fit(server.teacher, samples, server.server_distil, self._taught, name="distil")
        server.state["tail"] = copy_of(server.teacher)
        answers = server.predict(server.teacher, samples).split([len(m.labels) for m in said])
        fresh = {str(client): own.clone() for client, own in zip(sorted(knowledge), answers)}
        server.state["answers"] = server.state.get("answers", {}) | fresh
        return {}

    def client_model(self, server: Server, client: Client) -> nn.Module:
        """The client's extractor with the server's model on top."""
        load_into(server.teacher, server.state["tail"])
        return _Joined(self, client.specialist(), server.teacher)

    def _taught(self, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        inputs, labels, answers = batch
        logits = module(inputs).logits
        hard = cross_entropy(logits, labels)
        soft = kd_loss(logits, torch.softmax(answers, dim=1), self.temperature)
        parts = {"cross_entropy": hard.detach(), "distillation": soft.detach()}
        return {**parts, "loss": hard + self.weight * soft}

    def _features(self, module: nn.Module, inputs: Any) -> Tensor:
        """What is sent of a batch, [B, d]."""
        if self.layer is None:
            return module(inputs).embedding
        return module(inputs, features=(self.layer,)).features[self.layer].flatten(1)

    def _shaped(self, tail: nn.Module, features: Tensor) -> Tensor:
        return features if tail.input_shape is None else features.view(len(features), *tail.input_shape)


class _Joined(nn.Module):
    """An extractor below, the server's model above."""

    def __init__(self, method: FedGKT, extractor: LightningModule, tail: LightningModule):
        super().__init__()
        self.method, self.extractor, self.tail = method, extractor, tail

    def forward(self, inputs: Any) -> Output:
        return self.tail(self.method._shaped(self.tail, self.method._features(self.extractor, inputs)))


class _Everything(Aggregate):
    """Keeps what every client of a round sent."""

    def __init__(self, num_classes: int, width: int | None):
        self.num_classes, self.width = num_classes, width
        self.messages: dict[int, PrivateFeatures] = {}

    def add(self, message: PrivateFeatures, client: int) -> None:
        if not isinstance(message, PrivateFeatures):
            raise RejectedMessageError(f"expected private features, got {message.kind}")
        message.validate()
        known = message.logits.shape[1], int(message.labels.max()) + 1 if len(message.labels) else 0
        if known[0] != self.num_classes or known[1] > self.num_classes:
            raise RejectedMessageError(
                f"expected logits and labels of {self.num_classes} classes, got {known[0]}, {known[1]}"
            )
        if self.width is not None and message.features.shape[1] != self.width:
            raise RejectedMessageError(f"expected features [n, {self.width}], got {list(message.features.shape)}")
        self.messages[client] = message

    def result(self) -> dict[int, PrivateFeatures] | None:
        return self.messages or None
