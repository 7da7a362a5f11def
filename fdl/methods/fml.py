"""Federated mutual learning: a private and a shared model teach each other; only the shared one is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.server_optimizers import ServerOptimizer
from fdl.losses.responses import distillation
from fdl.messages import Parameters
from fdl.methods.fedavg import FedAvg
from fdl.participants import Client
from fdl.robust.base import RobustRule
from fdl.state.weights import module_state


class FML(FedAvg):
    """FedAvg of a shared "meme" model that learns mutually with a personal model at each client (Shen et al., 2020).

    On each private batch the personal model f, which is the client's specialist, and the meme g, which has the
    student's architecture, learn from the labels and from each other's predictions:
    L_f = α CE + (1 − α) T² KL(p_g ‖ p_f) and L_g = β CE + (1 − β) T² KL(p_f ‖ p_g). No gradient of a term reaches its
    teacher. Memes are averaged by FedAvg; personal models never leave their site. Both are trained by one optimiser
    with the recipe's `local_training` settings, whose gradient clip applies to the two together.

    Args:
        alpha: α, share of the labels in the personal model's loss, in [0, 1]; 1 is local training.
        beta: β, share of the labels in the meme's loss, in [0, 1]; 1 is FedAvg.
        temperature: T > 0 of both distillation terms.
        optimizer: server optimiser, applied to the mean of the memes; None takes the mean as the new weights.
        robust: robust aggregation rule instead of the mean; None is the mean.
    """

    name = "fml"
    tasks = ("classification",)
    requires = ("student", "specialists")

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        temperature: float = 1.0,
        optimizer: ServerOptimizer | None = None,
        robust: RobustRule | None = None,
    ):
        super().__init__(optimizer, robust)
        for key, share in (("alpha", alpha), ("beta", beta)):
            if not 0 <= share <= 1:
                raise UserError(f"{key} must be in [0, 1], got {share}")
        if not temperature > 0:
            raise UserError(f"temperature must be > 0, got {temperature}")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train the personal model and the meme on the same batches; return the meme's weights."""
        meme, personal = client.load(download.tensors, "student"), client.specialist()
        both = nn.ModuleDict({"meme": meme, "personal": personal})
        both.train()  # a new container is in training mode, whatever mode its parts are in
        yield FitRequest(both, client.train, client.local_training, self.mutual)
        client.save_specialist(personal)
        return Parameters(module_state(meme), samples=client.reported_samples)

    def mutual(self, both: nn.ModuleDict, batch: Any) -> Mapping[str, Tensor]:
        """Return the sum of both losses; no gradient of the one reaches the other's model.

        Args:
            both: meme and personal model.
            batch: inputs and labels.
        """
        inputs, labels = batch
        meme, personal = both["meme"](inputs).logits, both["personal"](inputs).logits
        learns = {
            "personal": distillation(personal, meme.detach(), labels, 1 - self.alpha, self.temperature),
            "meme": distillation(meme, personal.detach(), labels, 1 - self.beta, self.temperature),
        }
        parts = {f"{who}_{name}": value.detach() for who, losses in learns.items() for name, value in losses.items()}
        return {**parts, "loss": learns["personal"]["loss"] + learns["meme"]["loss"]}
