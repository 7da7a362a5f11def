"""Standard distillation from one large teacher, a reference that needs all data in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.knowledge.distillation.targets import ResponseObjective, SoftLabelled
from fdl.losses.responses import distillation
from fdl.messages import Message
from fdl.methods.base import Method
from fdl.modules.objectives import mean_over, samples_of
from fdl.participants import Client, Server


class Distillation(Method):
    """Reference: distil one large teacher, trained on all private data pooled, into the student (Hinton et al., 2015).

    On the proxy set the loss is T² KL(teacher ‖ student); on the pooled private data, whose labels are known there, it
    is (1 − weight) CE + weight T² KL.

    Args:
        transfer: samples on which the student learns: the public ``"proxy"`` set, or the ``"private"`` data themselves.
        temperature: T > 0.
        weight: weight of the distillation term on labelled samples, in [0, 1].
        train_teacher: train the teacher on the pooled data first; false for a pretrained one.
    """

    name = "distillation"
    sends = ()
    tasks = ("classification",)
    requires = ("student", "teacher", "proxy", "pooled")

    def __init__(
        self,
        transfer: Literal["proxy", "private"] = "proxy",
        temperature: float = 4.0,
        weight: float = 0.9,
        train_teacher: bool = True,
    ):
        if not temperature > 0:
            raise UserError(f"temperature must be > 0, got {temperature}")
        if not 0 <= weight <= 1:
            raise UserError(f"weight must be in [0, 1], got {weight}")
        self.transfer, self.temperature, self.weight = transfer, temperature, weight
        self.train_teacher = train_teacher

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Train the teacher, and predict the transfer set once."""
        if self.train_teacher:
            server.fit(server.teacher, server.pooled, server.local_training, name="teacher")
        samples = server.proxy if self.transfer == "proxy" else server.pooled
        server.state["predictions"] = server.predict(server.teacher, samples)

    def local_update(self, client: Client, download: Message | None) -> Message | None:
        """Return None: clients have nothing to do."""
        return None

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Train the student on the teacher's predictions."""
        predictions = server.state["predictions"]
        if self.transfer == "proxy":
            samples = SoftLabelled(server.proxy, torch.softmax(predictions, dim=1))
            objective = ResponseObjective("kl", self.temperature)
        else:
            # labels go along with the predictions, as one more column
            labels = server.pooled.labels.unsqueeze(1).to(predictions.dtype)
            samples, objective = (
                SoftLabelled(server.pooled, torch.cat([predictions, labels], dim=1)),
                self._labelled_loss,
            )
        server.fit(server.student, samples, server.server_distil, objective, name="distil")
        return {}

    @mean_over(samples_of)
    def _labelled_loss(self, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        inputs, columns = batch
        logits = module(inputs).logits
        predictions, labels = columns[:, :-1], columns[:, -1].long()
        return distillation(logits, predictions, labels, alpha=self.weight, temperature=self.temperature)
