"""FedAvg whose clients are held near the global model."""

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
    """A module's own loss and a proximal term.

    Attributes:
        anchor: the weights near which it is held.
        mu: how firmly.
        ignores_padding: whether the module's own loss does; the proximal term does not look at samples.
    """

    anchor: list[Tensor]
    mu: float
    ignores_padding: bool

    def penalty(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        """The proximal term: a sum over weights alone, so that it can be taken of parts of them."""
        return proximal(parameters, anchor, self.mu)

    def add_penalty(self, losses: Mapping[str, Tensor], penalty: Tensor) -> dict[str, Tensor]:
        """The module's own losses with the term."""
        return {**losses, "loss": losses["loss"] + penalty, "proximal": penalty}


class FedProx(FedAvg):
    """FedAvg with a proximal term μ/2 ‖w − w_t‖² in every client's loss (Li et al., 2020).

    Args:
        mu: weight of the proximal term, ≥ 0; 0 is FedAvg.
        optimizer: what the server does with the mean; None takes it as it is.
        robust: as in FedAvg.
    """

    name = "fedprox"

    def __init__(self, mu: float = 0.01, optimizer: ServerOptimizer | None = None, robust: RobustRule | None = None):
        super().__init__(optimizer, robust)
        if mu < 0:
            raise UserError(f"mu must be ≥ 0, got {mu}")
        self.mu = mu

    def objective(self, module: nn.Module) -> Objective:
        """The module's own loss and the proximal term around the weights that were sent."""
        anchor = [parameter.detach().clone() for parameter in module.parameters()]
        return ProximalObjective(anchor, self.mu, is_padding_safe(module.training_step))
