"""Server optimisers, which update the global weights by the mean of the clients' weights.

Source: Reddi et al., "Adaptive Federated Optimization", 2021, with D = mean − w as the negative pseudo-gradient. As in
the paper, second moments start at τ² and there is no bias correction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdl.errors import UserError


class ServerOptimizer(ABC):
    """Optimiser that computes new global weights from the old ones and the clients' mean."""

    name: ClassVar[str]

    def step(
        self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor], trained: set[str], moments: dict[str, Any]
    ) -> Mapping[str, Tensor]:
        """Compute the new weights.

        Args:
            current: the global weights and buffers.
            mean: the clients' mean of them.
            trained: names of the weights that are optimised; all others, such as running statistics, are averaged.
            moments: the optimiser's state between rounds, changed in place.

        Returns:
            New tensors under the names of `mean`.
        """
        result = dict(mean)
        for name in trained:
            old = current[name].detach().to(mean[name].device)
            result[name] = old + self.displacement(mean[name] - old, moments.setdefault(name, {}))
        return result

    @abstractmethod
    def displacement(self, delta: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """Displacement of one weight.

        Args:
            delta: the clients' mean displacement D.
            moments: this weight's moments, changed in place.
        """


class Average(ServerOptimizer):
    """Take the clients' mean as it is."""

    name = "average"

    def step(
        self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor], trained: set[str], moments: dict[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the mean itself, not w + (mean − w), which would round."""
        return mean

    def displacement(self, delta: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """The clients' mean displacement."""
        return delta


class SGD(ServerOptimizer):
    """Server SGD: m ← βm + D, w ← w + η m. With the defaults the plain average; with β > 0 FedAvgM (Hsu et al., 2019).

    Momentum has no default of its own, as in `torch.optim.SGD`: with β the steps add up to η / (1 − β) times the mean
    displacement, so that a rate that suits an average diverges.

    Args:
        lr: server learning rate η, > 0.
        momentum: β in [0, 1); FedAvgM's is 0.9, with a rate η well below 1.
        nesterov: look ahead by one step of momentum.
    """

    name = "sgd"

    def __init__(self, lr: float = 1.0, momentum: float = 0.0, nesterov: bool = False):
        _check(lr=lr, momentum=momentum)
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov

    def displacement(self, delta: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """η m, or with Nesterov η (D + β m)."""
        m = moments["m"] = self.momentum * moments["m"] + delta if "m" in moments else delta
        return self.lr * (delta + self.momentum * m if self.nesterov else m)


class _Adaptive(ServerOptimizer):
    def __init__(self, lr: float, beta1: float, beta2: float, tau: float):
        _check(lr=lr, beta1=beta1, beta2=beta2, tau=tau)
        self.lr, self.beta1, self.beta2, self.tau = lr, beta1, beta2, tau

    def displacement(self, delta: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """η m / (√v + τ)."""
        m = moments.get("m", torch.zeros_like(delta))
        v = moments.get("v", torch.full_like(delta, self.tau**2))
        m = moments["m"] = self.beta1 * m + (1 - self.beta1) * delta
        v = moments["v"] = self.second_moment(v, delta.square())
        return self.lr * m / (v.sqrt() + self.tau)

    @abstractmethod
    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """The new second moment.

        Args:
            v: the old second moment.
            squared: D².
        """


class Adam(_Adaptive):
    """FedAdam: v ← β₂ v + (1 − β₂) D².

    Args:
        lr: server learning rate η, > 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        tau: adaptivity τ, > 0; larger is closer to SGD.
    """

    name = "adam"

    def __init__(self, lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3):
        super().__init__(lr, beta1, beta2, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Exponential moving average of D²."""
        return self.beta2 * v + (1 - self.beta2) * squared


class Yogi(_Adaptive):
    """FedYogi: v ← v − (1 − β₂) D² sign(v − D²).

    Args:
        lr: server learning rate η, > 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        tau: adaptivity τ, > 0; larger is closer to SGD.
    """

    name = "yogi"

    def __init__(self, lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3):
        super().__init__(lr, beta1, beta2, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Step towards D², of a length that does not grow with the distance."""
        return v - (1 - self.beta2) * squared * torch.sign(v - squared)


class Adagrad(_Adaptive):
    """FedAdagrad: v ← v + D².

    Args:
        lr: server learning rate η, > 0.
        beta1: decay of the first moment, in [0, 1).
        tau: adaptivity τ, > 0; larger is closer to SGD.
    """

    name = "adagrad"

    def __init__(self, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3):
        super().__init__(lr, beta1, 0.0, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Sum of all D²."""
        return v + squared


def _check(**values: float) -> None:
    for name, value in values.items():
        if name in ("lr", "tau") and not value > 0:
            raise UserError(f"{name} must be > 0, got {value}")
        if name not in ("lr", "tau") and not 0 <= value < 1:
            raise UserError(f"{name} must be in [0, 1), got {value}")
