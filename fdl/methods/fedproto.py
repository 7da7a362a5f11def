"""Federated prototype learning: clients share class prototypes instead of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.pools import architectures
from fdl.knowledge.transfer.class_prototypes import ClassPrototypeMeans, NearestPrototype
from fdl.losses.responses import cross_entropy
from fdl.messages import Prototypes
from fdl.methods.base import Method
from fdl.modules.objectives import Objective
from fdl.participants import Client, Server


class FedProto(Method):
    """Clients pull their embeddings towards the classes' common prototypes (Tan et al., 2022).

    A prototype is the mean embedding of a class's samples at a client, which uploads it with their number after
    training in each round; the server sends back one per class. From then on clients minimise CE + λ MSE(h, C_y) on
    their own data, where samples of a class without a common prototype add nothing. Architectures may differ, but their
    embeddings must have the same width. No proxy set is needed and there is no student. As in the paper a client
    predicts the class of the nearest common prototype, so that it can predict classes that it has never seen; the
    accuracies of this and of its own head on its held-out samples are logged with its losses.

    A prototype is a mean of private samples in the model's feature space: one of few samples reveals much about them.

    Args:
        weight: λ ≥ 0; 0 is local training.
        average: weights of the clients that have a class in its common prototype: all alike (``"clients"``), as in the
            published code, or by their number of ``"samples"`` of it, as in the paper's equation 6.
        answer: classifier by which a client's model is evaluated: the nearest common ``"prototype"`` among all classes
            that have one (the published code compares those of the client's own classes alone), or its ``"head"``.
    """

    name = "fedproto"
    sends = (Prototypes,)
    tasks = ("classification",)
    requires = ("specialists",)

    def __init__(
        self,
        weight: float = 1.0,
        average: Literal["clients", "samples"] = "clients",
        answer: Literal["prototype", "head"] = "prototype",
    ):
        if not weight >= 0:
            raise UserError(f"weight must be ≥ 0, got {weight}")
        self.weight, self.by_samples, self.by_prototype = weight, average == "samples", answer == "prototype"

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check that all embeddings have the same width."""
        modules = {key: server.runtime.shared_module(key) for key in architectures(server.runtime)}
        widths = {key: module.embedding_dim for key, module in modules.items() if module.embedding_dim is not None}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{key} {width}" for key, width in widths.items())
            raise UserError(f"specialists: prototypes need embeddings of one width, got {found}")

    def download(self, server: Server, client: int) -> Prototypes | None:
        """Return the common prototypes with their numbers of samples or clients; None in the first round."""
        common = server.state.get("prototypes")
        if common is None:
            return None
        labels = torch.nonzero(common["counts"]).squeeze(1)
        return server.cached_download(
            "all", lambda: Prototypes(common["values"][labels], labels, common["counts"][labels])
        )

    def local_update(self, client: Client, download: Prototypes | None) -> Requests[Prototypes]:
        """Train on private data near the common prototypes, and return the client's own prototypes."""
        specialist = client.specialist()
        objective = None if download is None or self.weight == 0 else self._prototype_objective(client, download)
        yield FitRequest(specialist, client.train, client.local_training, objective)
        client.save_specialist(specialist)
        self._log_accuracy(client, specialist, download)
        embeddings = client.predict(specialist, client.train, "embedding")
        labels, members, counts = client.train.labels.unique(return_inverse=True, return_counts=True)
        means = torch.zeros(len(labels), embeddings.shape[1], dtype=torch.float64)
        means.index_add_(0, members, embeddings.double()).div_(counts.unsqueeze(1))
        return Prototypes(means.float(), labels, counts)

    def aggregate(self, server: Server) -> ClassPrototypeMeans:
        """Return empty means per class."""
        common = server.state.get("prototypes")
        width = None if common is None else common["values"].shape[1]
        return ClassPrototypeMeans(server.num_classes, width, self.by_samples)

    def server_update(self, server: Server, knowledge: dict[str, Tensor]) -> dict[str, float]:
        """Take the new prototypes; a class without a new one keeps its last."""
        before = server.state.get("prototypes", knowledge)
        fresh = knowledge["counts"] > 0
        server.state["prototypes"] = {
            "values": torch.where(fresh.unsqueeze(1), knowledge["values"], before["values"]),
            "counts": torch.where(fresh, knowledge["counts"], before["counts"]),
        }
        return {"prototypes": float((server.state["prototypes"]["counts"] > 0).sum())}

    def client_model(self, server: Server, client: Client) -> nn.Module:
        """Return the client's model with a classifier by the nearest common prototype instead of its head."""
        specialist, common = client.specialist(), server.state.get("prototypes")
        if not self.by_prototype or common is None:
            return specialist
        return NearestPrototype(specialist, common["values"], common["counts"] > 0)

    def _prototype_objective(self, client: Client, common: Prototypes) -> Objective:
        """Return CE plus λ times the squared distance to the class's prototype, a mean over samples and dimensions."""
        centres, exists = torch.zeros(client.num_classes, common.values.shape[1]), torch.zeros(client.num_classes)
        centres[common.labels], exists[common.labels] = common.values, 1.0
        centres, exists = centres.to(client.runtime.device), exists.to(client.runtime.device)

        def loss(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
            inputs, labels = batch
            output = module(inputs)
            hard = cross_entropy(output.logits, labels)
            distances = (output.embedding.float() - centres[labels]).square().mean(1)
            distance = (distances * exists[labels]).mean()
            parts = {"cross_entropy": hard.detach(), "prototype": distance.detach()}
            return {**parts, "loss": hard + self.weight * distance}

        return loss

    def _log_accuracy(self, client: Client, specialist: nn.Module, common: Prototypes | None) -> None:
        """Log the accuracies of head and nearest common prototype on held-out samples."""
        if common is None or len(client.calibration) == 0 or client.runtime.is_dry_run:
            return
        labels = client.calibration.labels
        nearest = torch.cdist(client.predict(specialist, client.calibration, "embedding"), common.values.float())
        predicted = {
            "head": client.predict(specialist, client.calibration).argmax(1),
            "nearest_prototype": common.labels[nearest.argmin(1)],
        }
        for classifier, classes in predicted.items():
            client.metrics[f"held_out/{classifier}"] = float((classes == labels).float().mean())
