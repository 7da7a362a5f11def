"""A method: every client votes for the class of each public sample, and the student learns the shares of the votes.

python -m fdl fit --recipe examples/majority_vote.yaml
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.distillation.targets import ResponseObjective, SoftLabelled
from fdl.messages import Message, TensorMessage
from fdl.methods.base import Method
from fdl.participants import Client, Server


class Votes(Aggregate):
    """Number of votes per proxy sample and class.

    Args:
        samples: size of the proxy set.
        classes: number of classes.
    """

    def __init__(self, samples: int, classes: int):
        self.counts = torch.zeros(samples, classes)

    def add(self, message: TensorMessage, client: int) -> None:
        """Count one client's votes."""
        votes = message.groups.get("votes", {}).get("class")
        samples, classes = self.counts.shape
        if votes is None or votes.shape != (samples,) or votes.dtype != torch.uint8 or votes.max() >= classes:
            raise RejectedMessageError(f"expected one of {classes} classes for each of {samples} samples")
        self.counts[torch.arange(samples), votes.long()] += 1

    def result(self) -> Tensor | None:
        """Return the shares of the votes, [samples, classes]; None where nobody voted."""
        voters = self.counts[0].sum()
        return self.counts / voters if voters > 0 else None


class MajorityVote(Method):
    """Distillation from hard votes: a client sends one byte per public sample, whatever its architecture.

    Args:
        temperature: of the student's softmax in the distillation loss, > 0.
    """

    name = "majority_vote"
    tasks = ("classification",)
    requires = ("student", "specialists", "proxy")
    sends = (TensorMessage,)

    def __init__(self, temperature: float = 1.0):
        self.objective = ResponseObjective("kl", temperature)

    def setup_bytes(self, server: Server) -> dict[str, int]:
        """Every client must hold the proxy set before the first round."""
        return {"proxy": server.proxy.nbytes}

    def local_update(self, client: Client, download: Message | None) -> TensorMessage:
        """Train the client's own model on private data, then vote."""
        module = client.specialist()
        client.fit(module, client.train, client.local_training)
        client.save_specialist(module)
        votes = client.predict(module, client.proxy).argmax(1).to(torch.uint8)
        return TensorMessage({"votes": {"class": votes}}, samples=client.samples, kind="votes")

    def aggregate(self, server: Server) -> Votes:
        """No votes yet."""
        return Votes(len(server.proxy), server.num_classes)

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Train the student on the proxy set with shares of votes in the place of labels."""
        server.fit(
            server.student, SoftLabelled(server.proxy, knowledge), server.server_distil, self.objective, name="distil"
        )
        return {"unanimous": float((knowledge.max(1).values == 1).float().mean())}
