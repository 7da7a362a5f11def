"""FedAvg whose average is refined by distilling the clients' ensemble into it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from fdl.engine.requests import FitRequest, PredictRequest, Requests
from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.means import ParameterMean, ResponseMean
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.distillation.targets import ResponseObjective, SoftLabelled
from fdl.knowledge.distillation.validated import BestOnValidation
from fdl.messages import Bundle, Message, Parameters, QuantizedLogWeights, Responses, Scores, parts_of
from fdl.methods.base import Method
from fdl.participants import Client, Server, copy_of
from fdl.state.weights import load_into, module_state
from fdl.utils.arguments import at_least
from fdl.utils.seeding import stream_seed

ABOVE_CHANCE = 1.2
"""A teacher must be right so many times as often as by guessing, where the worst are dropped; the published code's."""


class FedDF(Method):
    """Average the clients' weights, then distil the mean of their logits into the average (Lin et al., 2020).

    KL(softmax(mean_k f_k(x)) ‖ softmax(f(x))) on the proxy set at temperature 1, teachers weighted alike. With
    specialists of several architectures there is one group an architecture: each is averaged by itself and then taught
    by all clients. The recipe's student then is one more group, which has no clients and is taught only.

    As in the paper, what a distillation leaves is the model that did best on validation data among those that it passed
    through, the average itself included. **This uses the server's labelled validation samples inside training**, which
    FedAvg and methods that exchange answers do without; they are never trained on, but a server that has no labels can
    only take ``select: last``. Without it, an ensemble of clients that know few classes each drags the average down
    where it is better than they are together.

    The paper's settings for 10,000 steps of distillation are ``every: 100`` and ``patience: 1000``, with Adam at 0.001,
    a cosine schedule over all steps and gradients clipped at 5, which are the recipe's `distil`.

    With a confidence, clients send with their weights how much they count as teachers of each proxy sample, and the
    mean of logits is weighted by it; the average of weights stays by sample counts. With `domain_classifier` that is
    FedAUX (Sattler et al., 2021) without its start from self-supervised pretraining and without its noise; with
    ``select: last``, as there, no labels of the server's are used.

    Args:
        architectures: whether clients train the student's architecture or their own specialists'.
        select: which model a distillation leaves: the best on ``"validation"`` data, or the ``"last"``.
        every: steps between two looks at the validation data, ≥ 1; the last step is looked at as well.
        patience: steps without gain on validation data after which a distillation ends, ≥ 1; None for all steps.
        drop_worst: leave clients whose model does no better than chance on validation data, that is below 1.2 / C of C
            classes as in the published code, out of the ensemble, though not out of the average; where that leaves
            nobody, all are kept.
        confidence: how much a client counts as a teacher of a proxy sample; None weights all alike. The proxy set is
            then sent to all clients, with the public encoder where it is measured in its space.
        cap: as in `FederatedDistillation`, where clients send a confidence.
    """

    name = "feddf"
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
        cap: float | None = 2.0,
    ):
        self.heterogeneous = architectures == "specialists"
        if self.heterogeneous:
            self.requires = (*self.requires, "specialists")
        self.validated, self.every = select == "validation", at_least("every", every, 1)
        self.patience = None if patience is None else at_least("patience", patience, 1)
        self.drop_worst, self.weighting, self.cap = drop_worst, confidence, Cap.of(cap)
        if confidence is not None and confidence.needs_calibration:
            raise UserError(f"confidence {confidence.name} asks a client's specialist, and clients of feddf have none")

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Draw first weights for every architecture that clients train.

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
        """Nothing, or what clients need to say how much they count: the proxy set, and the public encoder."""
        if self.weighting is None:
            return {}
        costs = {"proxy": server.proxy.nbytes}
        if server.encoder is not None and self.weighting.needs_encoder:
            costs["encoder"] = server.encoder.nbytes()
        return costs

    def download(self, server: Server, client: int) -> Message:
        """The weights of the client's group, one message for all clients of it."""
        group = self._group(server, client)
        return server.say(group, lambda: Parameters(self._weights(server, group)))

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters | Bundle]:
        """Train the group's model on private data; return its weights and, if asked, how much it counts."""
        module = client.load(download.tensors, client.architecture if self.heterogeneous else "student")
        yield FitRequest(module, client.train, client.local)
        weights = Parameters(module_state(module), samples=client.told_samples)
        if self.weighting is None:
            return weights
        scores = self.weighting.log_weights(client, (yield PredictRequest(module, client.proxy)))
        return Bundle((weights, Scores(QuantizedLogWeights.quantize(scores))))

    def aggregate(self, server: Server) -> _Ensemble:
        """Means of the weights by group, and of all clients' logits."""
        return _Ensemble(self, server)

    def server_update(self, server: Server, knowledge: tuple[dict[str, Any], Tensor, int]) -> dict[str, float]:
        """Put every group on its average, then teach it by all."""
        averages, logits, teachers = knowledge
        samples = SoftLabelled(server.proxy, torch.softmax(logits, dim=1))
        for group, tensors in averages.items():
            if group != "student":
                module = server.runtime.template(group)
                load_into(module, tensors)
                self._teach(server, module, samples, f"distil/{group}")
                server.state["groups"][group] = copy_of(module)
        if "student" in averages:
            load_into(server.student, averages["student"])
        return {"teachers": float(teachers), **self._teach(server, server.student, samples, "distil")}

    def _teach(self, server: Server, module: LightningModule, samples: SoftLabelled, name: str) -> dict[str, float]:
        """Distil the ensemble into a module; returns after which step it was best, and how many were taken."""
        objective = ResponseObjective("kl", 1.0)
        if not self.validated or server.runtime.dry:
            server.fit(module, samples, server.distil, objective, name=name)
            return {}
        watch = BestOnValidation(server, module, self.every, self.patience)
        server.fit(module, samples, server.distil, objective, name=name, watch=watch)
        watch.restore()
        return {"best_step": float(watch.best_step), "steps": float(watch.steps)}

    def _group(self, server: Server, client: int) -> str:
        return server.state["members"][str(client)] if self.heterogeneous else "student"

    def _weights(self, server: Server, group: str) -> dict[str, Tensor]:
        return module_state(server.student) if group == "student" else server.state["groups"][group]


class _Ensemble:
    """Streams over clients: each one's weights answer the proxy set, then go into their group's mean."""

    def __init__(self, method: FedDF, server: Server):
        self.method, self.server = method, server
        self.means: dict[str, ParameterMean] = {}
        # sums of logits and numbers of clients: of those who teach, and of those who are dropped
        self.sums: dict[bool, Tensor] = {}
        self.counts = {True: 0, False: 0}
        self.expected = {Parameters} if method.weighting is None else {Parameters, Scores}
        # the same where teachers are weighted
        self.weighted: dict[bool, ResponseMean] = {}
        if method.weighting is not None:
            make = partial(ResponseMean, len(server.proxy), server.num_classes, "logits", True, method.cap)
            self.weighted = {True: make(), False: make()}

    def add(self, upload: Message | Bundle, client: int) -> None:
        parts = parts_of(upload)
        if parts.keys() != self.expected:
            expected, got = (" and ".join(sorted(kind.kind for kind in kinds)) for kinds in (self.expected, parts))
            raise RejectedMessageError(f"expected {expected}, got {got}")
        message = parts[Parameters]
        group = self.method._group(self.server, client)
        module = self.server.runtime.template(group)
        try:
            load_into(module, message.tensors)
        except ValueError as error:
            raise RejectedMessageError(str(error)) from error
        self.server.runtime.hold(group, None)
        logits = self.server.predict(module, self.server.proxy)
        if not torch.isfinite(logits).all():
            raise RejectedMessageError("its model's answers to the proxy set are not finite")
        teaches = not self.method.drop_worst or self._beats_chance(module)
        if self.weighted:
            answers = Responses(logits, "logits", confidence=parts[Scores].confidence)
            self.weighted[teaches].checked(answers)
        if group not in self.means:
            self.means[group] = ParameterMean(self.method._weights(self.server, group))
        self.means[group].add(message, client)
        if self.weighted:
            self.weighted[teaches].add(answers, client)
        else:
            self.sums[teaches] = self.sums[teaches] + logits if teaches in self.sums else logits
        self.counts[teaches] += 1

    def result(self) -> tuple[dict[str, Any], Tensor, int] | None:
        """Averages by group, the teachers' mean logits, and how many teachers there are."""
        if not self.means:
            return None
        teach = self.counts[True] > 0
        averages = {group: mean.result() for group, mean in self.means.items()}
        logits = self.weighted[teach].result().values if self.weighted else self.sums[teach] / self.counts[teach]
        return averages, logits, self.counts[teach]

    def _beats_chance(self, module: LightningModule) -> bool:
        labels = self.server.validation.labels
        right = (self.server.predict(module, self.server.validation).argmax(1) == labels).float().mean()
        return float(right) >= ABOVE_CHANCE / self.server.num_classes
