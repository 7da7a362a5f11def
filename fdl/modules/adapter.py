"""Adapters from each participant's features to the student's space: ``h_i = g(f_i, d_i; φ)`` with participant d_i.

Adapters are trained with the student, saved with the server's state, and not needed after training. Initially all of
them treat participants equally, except `LinearAdapter`, which shares no parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Adapter(nn.Module, ABC):
    """Base class of maps from the features of several participants into one space.

    Args:
        participants: number of participants.
        inputs: width of the participants' features.
        outputs: width of the student's space.
        rank: rank of each participant's own map, for low-rank adapters.
    """

    def __init__(self, participants: int, inputs: int, outputs: int, rank: int = 8):
        super().__init__()
        self.participants, self.inputs, self.outputs = participants, inputs, outputs

    @abstractmethod
    def forward(self, features: Tensor, participants: Tensor) -> Tensor:
        """Map features.

        Args:
            features: f, ``[B, P, inputs]``, features of P participants for each of B rows.
            participants: d, int64 ``[P]``, numbers of the participants.

        Returns:
            h, ``[B, P, outputs]``.
        """


class LinearAdapter(Adapter):
    """Separate linear map per participant: ``h = W_i f + b_i``.

    Args:
        participants: number of participants.
        inputs: width of the participants' features.
        outputs: width of the student's space.
        rank: ignored.
    """

    def __init__(self, participants: int, inputs: int, outputs: int, rank: int = 8):
        super().__init__(participants, inputs, outputs)
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(participants, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(participants, outputs))

    def forward(self, features: Tensor, participants: Tensor) -> Tensor:
        """Map features, see `Adapter.forward`."""
        return torch.einsum("bpi,poi->bpo", features, self.weight[participants]) + self.bias[participants]


class AffineAdapter(Adapter):
    """Shared linear map, scaled and shifted per participant: ``h = s_i ⊙ (W f + b) + t_i``.

    Args:
        participants: number of participants.
        inputs: width of the participants' features.
        outputs: width of the student's space.
        rank: ignored.
    """

    def __init__(self, participants: int, inputs: int, outputs: int, rank: int = 8):
        super().__init__(participants, inputs, outputs)
        self.trunk = nn.Linear(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(participants, outputs))
        self.shift = nn.Parameter(torch.zeros(participants, outputs))

    def forward(self, features: Tensor, participants: Tensor) -> Tensor:
        """Map features, see `Adapter.forward`."""
        return self.scale[participants] * self.trunk(features) + self.shift[participants]


class FiLMAdapter(Adapter):
    """Shared network with one hidden layer, modulated per participant: ``h = V gelu(s_i ⊙ W f + t_i)``.

    Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", with the participant as condition.

    Args:
        participants: number of participants.
        inputs: width of the participants' features.
        outputs: width of the student's space.
        rank: ignored.
    """

    def __init__(self, participants: int, inputs: int, outputs: int, rank: int = 8):
        super().__init__(participants, inputs, outputs)
        hidden = max(inputs, outputs)
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.scale = nn.Parameter(torch.ones(participants, hidden))
        self.shift = nn.Parameter(torch.zeros(participants, hidden))

    def forward(self, features: Tensor, participants: Tensor) -> Tensor:
        """Map features, see `Adapter.forward`."""
        hidden = self.scale[participants] * self.first(features) + self.shift[participants]
        return self.second(nn.functional.gelu(hidden))


class LowRankAdapter(Adapter):
    """Shared linear map plus a low-rank map per participant: ``h = W f + b + B_i A_i f``.

    As in LoRA (Hu et al.), B_i is initialised with zeros and A_i randomly.

    Args:
        participants: number of participants.
        inputs: width of the participants' features.
        outputs: width of the student's space.
        rank: rank of each participant's own map, limited to the smaller of the two widths.
    """

    def __init__(self, participants: int, inputs: int, outputs: int, rank: int = 8):
        super().__init__(participants, inputs, outputs)
        rank = min(rank, inputs, outputs)
        bound = 1 / math.sqrt(inputs)
        self.trunk = nn.Linear(inputs, outputs)
        self.down = nn.Parameter(torch.empty(participants, rank, inputs).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(participants, outputs, rank))

    def forward(self, features: Tensor, participants: Tensor) -> Tensor:
        """Map features, see `Adapter.forward`."""
        low = torch.einsum("bpi,pri->bpr", features, self.down[participants])
        return self.trunk(features) + torch.einsum("bpr,por->bpo", low, self.up[participants])


ADAPTERS: dict[str, type[Adapter]] = {
    "linear": LinearAdapter,
    "affine": AffineAdapter,
    "film": FiLMAdapter,
    "low_rank": LowRankAdapter,
}
"""Adapters by their name in a recipe; ``identity`` needs no module."""
