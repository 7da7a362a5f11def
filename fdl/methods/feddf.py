"""FedAvg with ensemble distillation: the clients' ensemble is distilled into their average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from fdl.engine.requests import FitRequest, PredictRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.ensembles import GroupEnsemble
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.distillation.targets import ResponseObjective, SoftLabelled
from fdl.knowledge.distillation.validated import BestOnValidation
from fdl.messages import Bundle, Message, Parameters, QuantizedLogWeights, Scores
from fdl.methods.base import Method
from fdl.participants import Client, Server, copy_of
from fdl.state.weights import load_into, module_state
from fdl.utils.arguments import at_least
from fdl.utils.seeding import stream_seed


class FedDF(Method):
    """Average the clients' weights, then distil the mean of their logits into the average (Lin et al., 2020).

    KL(softmax(mean_k f_k(x)) ‖ softmax(f(x))) on the proxy set at temperature 1, teachers weighted alike. With
    specialists of several architectures, each architecture is a group, averaged by itself and then distilled from all
    clients. The recipe's student is then one more group without clients, which is only distilled.

    As in the paper, a distillation returns the best model on validation data among those that it passed through, the
    average itself included. **This uses the server's labelled validation samples inside training**, which FedAvg and
    methods that exchange predictions do without; they are never trained on, but a server without labels can only take
    ``select: last``. Then an ensemble of clients with few classes each can make the average worse, where the average
    is better than the ensemble.

    The paper's settings for 10,000 steps of distillation are ``every: 100`` and ``patience: 1000``, with Adam at 0.001,
    a cosine schedule over all steps and gradients clipped at 5, which are the recipe's `server_distil`.

    With a confidence, clients upload with their weights their log-weight as teachers of each proxy sample, and the
    mean of logits is weighted by it; the average of weights stays by sample counts. With `domain_classifier` this is
    FedAUX (Sattler et al., 2021) without its start from self-supervised pretraining and without its noise; with
    ``select: last``, as there, no server labels are used.

    Args:
        architectures: architecture that clients train: the ``"student"``'s or their own ``"specialists"``'.
        select: result of a distillation: the best model on ``"validation"`` data, or the ``"last"``.
        every: steps between two evaluations on validation data, ≥ 1; the last step is evaluated as well.
        patience: steps without gain on validation data after which a distillation ends, ≥ 1; None for all steps.
        drop_worst: leave clients whose model is no better than chance on validation data, that is below 1.2 / C of C
            classes as in the published code, out of the ensemble, though not out of the average; if no client were
            left, all are kept.
        confidence: weight of a client as a teacher of a proxy sample; None weights all alike. The proxy set is then
            sent to all clients, with the public encoder if confidence is measured in its space.
        max_client_share: largest weight of one client's confidences in a round, in equal shares, ≥ 1; None: no limit.
    """

    name = "feddf"
    sends = (Parameters, Scores)
    tasks = ("classification",)
    requires = ("student", "proxy")

    def __init__(
        self,
        architectures: Literal["student", "specialists"] = "student",
        select: Literal["validation", "last"] = "validation",
        every: int = 100,
        patience: int | None = 1000,
        drop_worst: bool = False,
        confidence: Confidence | None = None,
        max_client_share: float | None = 2.0,
    ):
        self.heterogeneous = architectures == "specialists"
        if self.heterogeneous:
            self.requires = (*self.requires, "specialists")
        self.validated, self.every = select == "validation", at_least("every", every, 1)
        self.patience = None if patience is None else at_least("patience", patience, 1)
        self.drop_worst, self.weighting, self.cap = drop_worst, confidence, Cap.of(max_client_share)
        if confidence is not None and confidence.needs_calibration:
            raise UserError(f"confidence {confidence.name} asks a client's specialist, and clients of feddf have none")

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Draw first weights for each architecture that clients train.

        Raises:
            UserError: there are no validation samples to select by.
        """
        if (self.validated or self.drop_worst) and len(server.validation) == 0:
            asking = "select validation" if self.validated else "drop_worst"
            raise UserError(
                f"method.args: {asking} asks the server's validation samples, and there are none: set "
                "data.args.validation, or select: last without drop_worst"
            )
        if self.heterogeneous:
            server.state["groups"] = {
                a: server.runtime.first_weights(a, stream_seed(server.seed, f"init/{a}"))
                for a in sorted({client.architecture for client in clients})
            }
            server.state["members"] = {str(client.id): client.architecture for client in clients}

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Return the bytes of what confidences need, the proxy set and the public encoder; nothing without them."""
        if self.weighting is None:
            return {}
        costs = {"proxy": server.proxy.nbytes}
        if server.encoder is not None and self.weighting.needs_encoder:
            costs["encoder"] = server.encoder.nbytes()
        return costs

    def download(self, server: Server, client: int) -> Message:
        """Return the weights of the client's group, one message for all clients of the group."""
        group = self._group(server, client)
        return server.cached_download(group, lambda: Parameters(self._weights(server, group)))

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters | Bundle]:
        """Train the group's model on private data; return its weights and, if configured, its confidences."""
        module = client.load(download.tensors, client.architecture if self.heterogeneous else "student")
        yield FitRequest(module, client.train, client.local_training)
        weights = Parameters(module_state(module), samples=client.reported_samples)
        if self.weighting is None:
            return weights
        scores = self.weighting.log_weights(client, (yield PredictRequest(module, client.proxy)))
        return Bundle((weights, Scores(QuantizedLogWeights.quantize(scores))))

    def aggregate(self, server: Server) -> GroupEnsemble:
        """Return empty means of the weights per group, and of all clients' logits."""
        return GroupEnsemble(
            server,
            group_of=lambda client: self._group(server, client),
            weights_of=lambda group: self._weights(server, group),
            drop_worst=self.drop_worst,
            weighted=self.weighting is not None,
            cap=self.cap,
        )

    def server_update(self, server: Server, knowledge: tuple[dict[str, Any], Tensor, int]) -> dict[str, float]:
        """Set each group to its average, then distil the ensemble into it."""
        averages, logits, teachers = knowledge
        samples = SoftLabelled(server.proxy, torch.softmax(logits, dim=1))
        for group, tensors in averages.items():
            if group != "student":
                with server.runtime.borrow(group, tensors) as module:
                    self._teach(server, module, samples, f"distil/{group}")
                    server.state["groups"][group] = copy_of(module)
        if "student" in averages:
            load_into(server.student, averages["student"])
        return {"teachers": float(teachers), **self._teach(server, server.student, samples, "distil")}

    def _teach(self, server: Server, module: LightningModule, samples: SoftLabelled, name: str) -> dict[str, float]:
        """Distil the ensemble into a module; return the best step and the number of steps if validation selects."""
        objective = ResponseObjective("kl", 1.0)
        if not self.validated or server.runtime.is_dry_run:
            server.fit(module, samples, server.server_distil, objective, name=name)
            return {}
        watch = BestOnValidation(server, module, self.every, self.patience)
        server.fit(module, samples, server.server_distil, objective, name=name, watch=watch)
        watch.restore()
        return {"best_step": float(watch.best_step), "steps": float(watch.steps)}

    def _group(self, server: Server, client: int) -> str:
        return server.state["members"][str(client)] if self.heterogeneous else "student"

    def _weights(self, server: Server, group: str) -> dict[str, Tensor]:
        return module_state(server.student) if group == "student" else server.state["groups"][group]
