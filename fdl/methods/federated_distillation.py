"""Federated distillation: specialists answer a public proxy set, a student learns from their answers."""

from __future__ import annotations

from typing import Literal

import torch

from fdl.errors import UserError
from fdl.knowledge.aggregation import Knowledge, ResponseMean
from fdl.knowledge.calibration import fit_temperature
from fdl.knowledge.confidence import Confidence
from fdl.knowledge.targets import Answered, response_objective
from fdl.losses import RESPONSE_LOSSES
from fdl.messages import Confidences, Responses
from fdl.methods.base import Method
from fdl.participants import Client, Server


class FederatedDistillation(Method):
    """Private specialists of any architecture answer the proxy set; the student is distilled from what they agree on.

    Up go responses and, row by row, each client's confidence in them; down go responses. Neither data nor weights
    leave a site. Answers are weighted by softmax over clients of their confidences, which are log-weights.

    Args:
        confidence: how much a client's answer to a proxy sample counts; None weighs all alike.
        space: average probabilities, as DS-FL does, or logits, as FedMD and FedDF do.
        temperature: that softens both the targets and the learner's answers in the loss; > 0.
        calibrate: divide each specialist's logits by a temperature fitted on its held-out private share.
        loss: response loss of the student and of specialists that learn from what comes back.
        feedback: what clients receive from the second round on: the aggregate, the student's answers, or nothing.
    """

    name = "federated_distillation"
    requires = ("student", "specialists", "proxy")

    def __init__(
        self,
        confidence: Confidence | None = None,
        space: Literal["probabilities", "logits"] = "probabilities",
        temperature: float = 1.0,
        calibrate: bool = False,
        loss: str = "kl",
        feedback: Literal["aggregate", "student", "none"] = "aggregate",
    ):
        if not temperature > 0:
            raise UserError(f"temperature must be > 0, got {temperature}")
        self.objective = response_objective(loss, temperature)
        self.form = RESPONSE_LOSSES[loss].form
        if self.form == "logits" and space == "probabilities":
            raise UserError(f"loss {loss} compares logits, so space must be logits, got {space}")
        self.confidence, self.space, self.temperature = confidence, space, temperature
        self.calibrate, self.feedback = calibrate, feedback

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """The proxy set, and the public encoder where confidence is measured in its space."""
        costs = {"proxy": server.proxy.nbytes}
        if self.confidence is not None and self.confidence.needs_encoder and server.encoder is not None:
            costs["encoder"] = server.encoder.nbytes()
        return costs

    def download(self, server: Server, client: int) -> Responses | None:
        """What the server holds for true of the proxy set, the same message for all clients of a round."""
        if "answers" not in server.state:
            return None
        return server.say("answers", lambda: Responses(server.state["answers"], form=self.form))

    def local_update(self, client: Client, download: Responses | None) -> Responses:
        """Learn from what came back, train on private data, answer the proxy set."""
        specialist = client.specialist()
        if download is not None:
            answered = Answered(client.proxy, download.values, download.rows)
            client.fit(specialist, answered, client.digest, self.objective, name="digest")
        client.fit(specialist, client.train, client.local)
        client.keep(specialist)
        logits = client.predict(specialist, client.proxy)
        if self.calibrate and len(client.calibration):
            held_out = client.predict(specialist, client.calibration)
            logits = logits / fit_temperature(held_out, client.calibration.labels)
        confidence = None
        if self.confidence is not None:
            confidence = Confidences.quantize(self.confidence.log_weights(client, logits))
        values = logits if self.space == "logits" else torch.softmax(logits, dim=1)
        return Responses(values, form=self.space, confidence=confidence, samples=client.samples)

    def aggregate(self, server: Server) -> ResponseMean:
        """A mean over clients, weighted row by row."""
        return ResponseMean(len(server.proxy), server.num_classes, self.space)

    def server_update(self, server: Server, knowledge: Knowledge) -> dict[str, float]:
        """Distil the student from the aggregate, and keep what is to be sent back."""
        values = knowledge.values
        targets = torch.softmax(values, dim=1) if self.space != self.form else values
        server.fit(server.student, Answered(server.proxy, targets), server.distil, self.objective, name="distil")
        if self.feedback == "aggregate":
            server.state["answers"] = targets
        elif self.feedback == "student":
            logits = server.predict(server.student, server.proxy)
            server.state["answers"] = logits if self.form == "logits" else torch.softmax(logits, dim=1)
        return {}
