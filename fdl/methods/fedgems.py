"""FedGEMS: a large server model and its clients teach each other on labelled public data, selectively."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean
from fdl.knowledge.aggregation.pools import labelled_bytes
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.losses.responses import cross_entropy
from fdl.messages import Message, Responses
from fdl.methods.base import Method
from fdl.participants import Client, Server

MIN_ENTROPY = 0.05
"""Entropy in nats below which a client's weight grows no further: 1/H of a one-hot prediction would be infinite."""


class FedGEMS(Method):
    """Selective distillation: the student learns from clients if it is wrong and they are right (Cheng et al., 2021).

    The data module's `public` samples carry labels; the server and all clients have them. In a round each client
    first learns ε CE + (1 − ε) KL(server ‖ client) on them, with the recipe's `client_distil` settings, then its
    private data, and uploads its logits of the public samples. The server determines which samples its student
    classifies correctly, and trains it, with the `server_distil` settings, on

    - CE where it is right; its logits there are stored;
    - ε CE + (1 − ε) KL(stored ‖ student) where it is wrong now and was right before;
    - KL(Σ_j a_j l_j ‖ student) where it was never right, a_j being the softmax of 1/H(p_j) over the clients that are
      right; CE if no client is.

    Correctness is determined once per round, before the server trains. Wrong predictions of clients are never learnt
    from, so that poisoned ones do little harm.

    Args:
        epsilon: ε, weight of the labels where there is a teacher as well, in [0, 1].
    """

    name = "fedgems"
    sends = (Responses,)
    tasks = ("classification",)
    requires = ("student", "specialists", "public")

    def __init__(self, epsilon: float = 0.75):
        if not 0 <= epsilon <= 1:
            raise UserError(f"epsilon must be in [0, 1], got {epsilon}")
        self.epsilon = epsilon

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Start with an empty memory of correct logits."""
        count = len(server.public)
        server.state["memory"] = torch.zeros(count, server.num_classes)
        server.state["remembered"] = torch.zeros(count, dtype=torch.bool)

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Return the bytes of the public samples and their labels."""
        return {"public": labelled_bytes(server.public, server.num_classes)}

    def download(self, server: Server, client: int) -> Responses | None:
        """Return the student's logits of the public samples, None in the first round."""
        if "predictions" not in server.state:
            return None
        return server.cached_download("all", lambda: Responses(server.state["predictions"], "logits"))

    def local_update(self, client: Client, download: Responses | None) -> Requests[Responses]:
        """Learn from the server and from public labels, then from private data; predict the public samples."""
        specialist, labels = client.specialist(), client.public.labels
        if download is not None:
            shares = torch.full((len(labels),), 1 - self.epsilon)
            samples = SoftLabelled(client.public, labels, more=[download.values, shares])
            yield FitRequest(specialist, samples, client.client_distil, _selective_loss, name="digest")
        yield FitRequest(specialist, client.train, client.local_training)
        client.save_specialist(specialist)
        return Responses(client.predict(specialist, client.public), "logits")

    def aggregate(self, server: Server) -> CorrectClientMean:
        """Return an empty mean of the correct clients' logits, per sample."""
        return CorrectClientMean(server.public.labels, server.num_classes)

    def server_update(self, server: Server, knowledge: AggregatedResponses) -> dict[str, float]:
        """Train the student on labels, on its stored logits, and on the correct clients' logits."""
        labels = server.public.labels
        logits = server.predict(server.student, server.public)
        right = logits.argmax(1) == labels
        memory = torch.where(right.unsqueeze(1), logits, server.state["memory"])
        remembered = server.state["remembered"]
        helped = ~right & ~remembered & (knowledge.coverage > 0)
        targets = torch.where(remembered.unsqueeze(1), memory, knowledge.values)
        shares = torch.zeros(len(labels))
        shares[~right & remembered], shares[helped] = 1 - self.epsilon, 1.0
        server.state["memory"], server.state["remembered"] = memory, remembered | right
        samples = SoftLabelled(server.public, labels, more=[targets, shares])
        server.fit(server.student, samples, server.server_distil, _selective_loss, name="distil")
        server.state["predictions"] = server.predict(server.student, server.public)
        kinds = {"right": right, "remembered": ~right & remembered, "helped": helped}
        return {f"public/{name}": float(rows.float().mean()) for name, rows in kinds.items()}


def _selective_loss(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    """Return (1 − s) CE + s KL(teacher ‖ module) with a weight s per sample."""
    inputs, labels, targets, shares = batch
    logits = module(inputs).logits.float()
    hard = F.cross_entropy(logits, labels, reduction="none")
    log_teacher = torch.log_softmax(targets, dim=1)
    soft = F.kl_div(torch.log_softmax(logits, dim=1), log_teacher, reduction="none", log_target=True).sum(1)
    parts = {"cross_entropy": cross_entropy(logits, labels).detach(), "distillation": (shares * soft).mean().detach()}
    return {**parts, "loss": ((1 - shares) * hard + shares * soft).mean()}


class CorrectClientMean(ResponseMean):
    """Mean logits of the clients whose likeliest class is the label, weighted by the softmax of their 1/H.

    Args:
        labels: of the public samples, int64 [n].
        num_classes: C.
    """

    def __init__(self, labels: Tensor, num_classes: int):
        super().__init__(len(labels), num_classes, "logits", weighted=False)
        self.labels = labels

    def add(self, responses: Message, client: int) -> None:
        """Take in one client's logits of all samples.

        Args:
            responses: the logits, [n, C].
            client: id of the sender.

        Raises:
            RejectedMessageError: they do not fit; the mean is as it was.
        """
        if not isinstance(responses, Responses) or responses.form != "logits" or responses.rows is not None:
            raise RejectedMessageError("expected logits of all public samples")
        log_weights, values = self._checked_log_weights(responses), self._checked_values(responses)
        rows = self._checked_rows(responses)[values.argmax(1) == self.labels]
        values = values[rows]
        entropy = torch.special.entr(torch.softmax(values, dim=1)).sum(1)
        certainty = log_weights[rows] + 1 / entropy.clamp_min(MIN_ENTROPY)
        self._accumulate(rows, certainty, torch.ones_like(certainty), values, torch.ones_like(rows))
        self.clients += 1
