"""Rounds of a few numbers, as an adversary sees them."""

from dataclasses import dataclass

import torch

from fdl.adversaries.base import AttackContext
from fdl.messages import Parameters, QuantizedLogWeights, Responses
from fdl.utils.seeding import torch_stream


@dataclass
class Player:
    """As much of a client as an adversary looks at."""

    id: int = 0
    round: int = 1
    seed: int = 0
    num_classes: int = 3
    task: str = "classification"

    def rng(self, purpose):
        return torch_stream(self.seed, purpose, self.round, self.id)


def answers(rows, form="probabilities", at=None, weights=None, samples=5):
    sure = None if weights is None else QuantizedLogWeights.quantize(torch.tensor(weights))
    places = None if at is None else torch.tensor(at)
    return Responses(torch.tensor(rows), form, places, sure, samples)


def weights(*values, samples=5):
    """Two tensors and a counter that nobody touches."""
    w = torch.tensor(values)
    return Parameters({"w": w[:1], "steps": torch.tensor(7), "b": w[1:]}, samples)


def context(own, honest=(), download=None, num_uploads=None, num_attackers=1, client=None, **more):
    count = num_uploads or len(honest) + num_attackers
    return AttackContext(
        client or Player(), own, download, honest, num_uploads=count, num_attackers=num_attackers, **more
    )


def flat(message):
    return torch.cat([message.tensors["w"], message.tensors["b"]]).tolist()
