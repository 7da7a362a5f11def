"""FedAvg with a proximal term that keeps clients near the global model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fdl.errors import UserError
from fdl.knowledge.aggregation.server_optimizers import ServerOptimizer
from fdl.losses.proximal import proximal
from fdl.methods.fedavg import FedAvg
from fdl.modules.objectives import Objective, PenalizedObjective, is_padding_safe
from fdl.modules.tracing import traceable
from fdl.robust.base import RobustRule


@traceable
@dataclass(eq=False)
class ProximalObjective(PenalizedObjective):
    """A module's own loss plus a proximal term.

    Attributes:
        anchor: weights at which the proximal term is zero, one tensor per parameter.
        mu: weight μ of the proximal term.
        ignores_padding: True if the module's own loss does; the proximal term does not depend on samples.
    """

    anchor: list[Tensor]
    mu: float
    ignores_padding: bool

    def penalty(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        """Return the proximal term, a sum over weights, so that it can be computed on parts of them.

        Args:
            parameters: the module's parameters, or parts of them.
            anchor: the anchor's tensors, or the same parts.
        """
        return proximal(parameters, anchor, self.mu)

    def add_penalty(self, losses: Mapping[str, Tensor], penalty: Tensor) -> dict[str, Tensor]:
        """Return the module's own losses with the proximal term added to ``"loss"``.

        Args:
            losses: the module's own losses.
            penalty: the proximal term over all weights.
        """
        return {**losses, "loss": losses["loss"] + penalty, "proximal": penalty}


class FedProx(FedAvg):
    """FedAvg with a proximal term μ/2 ‖w − w_t‖² in each client's loss (Li et al., 2020).

    Args:
        mu: weight of the proximal term, ≥ 0; 0 is FedAvg.
        optimizer: server optimiser, applied to the mean; None takes the mean as the new weights.
        robust: robust aggregation rule instead of the mean; None is the mean.
    """

    name = "fedprox"

    def __init__(self, mu: float = 0.01, optimizer: ServerOptimizer | None = None, robust: RobustRule | None = None):
        super().__init__(optimizer, robust)
        if mu < 0:
            raise UserError(f"mu must be ≥ 0, got {mu}")
        self.mu = mu

    def objective(self, module: nn.Module) -> Objective:
        """Return the module's own loss plus the proximal term around the downloaded weights."""
        anchor = [parameter.detach().clone() for parameter in module.parameters()]
        return ProximalObjective(anchor, self.mu, is_padding_safe(module.training_step))
