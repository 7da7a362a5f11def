"""FedAvg whose clients are held near the global model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fdl.errors import UserError
from fdl.losses import proximal
from fdl.methods.fedavg import FedAvg
from fdl.runtime import Objective, training_step
from fdl.server_optimizers import ServerOptimizer


class FedProx(FedAvg):
    """FedAvg with a proximal term μ/2 ‖w − w_t‖² in every client's loss (Li et al., 2020).

    Args:
        mu: weight of the proximal term, ≥ 0; 0 is FedAvg.
        optimizer: what the server does with the mean; None takes it as it is.
    """

    name = "fedprox"

    def __init__(self, mu: float = 0.01, optimizer: ServerOptimizer | None = None):
        super().__init__(optimizer)
        if mu < 0:
            raise UserError(f"mu must be ≥ 0, got {mu}")
        self.mu = mu

    def objective(self, module: nn.Module) -> Objective:
        """The module's own loss and the proximal term around the weights that were sent."""
        anchor = [parameter.detach().clone() for parameter in module.parameters()]

        def loss(module: nn.Module, batch) -> Mapping[str, Tensor]:
            parts = training_step(module, batch)
            term = proximal(list(module.parameters()), anchor, self.mu)
            return {**parts, "loss": parts["loss"] + term, "proximal": term}

        return loss
