"""SCAFFOLD: federated averaging whose clients correct their drift by control variates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.server_optimizers import SGD, Average
from fdl.knowledge.aggregation.tensor_mean import MeanTensors, WeightedMean
from fdl.messages import TensorMessage
from fdl.methods.base import Method
from fdl.modules.objectives import PenalizedObjective, is_padding_safe
from fdl.modules.tracing import traceable
from fdl.participants import Client, Server
from fdl.recipe.config import Fit
from fdl.state.weights import load_into, module_state


@traceable
@dataclass(eq=False)
class CorrectedObjective(PenalizedObjective):
    """A module's own loss plus ⟨w, c − c_i⟩, whose gradient is the correction of every local step.

    Attributes:
        anchor: the correction c − c_i, one tensor per parameter of the module.
        ignores_padding: True if the module's own loss does; the correction does not depend on samples.
    """

    anchor: list[Tensor]
    ignores_padding: bool

    def penalty(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        """Return the inner product of weights and correction, a sum over weights, so that it can be taken of parts."""
        return torch.stack([(p * a).sum() for p, a in zip(parameters, anchor)]).sum()


class Scaffold(Method):
    """FedAvg with control variates against client drift (Karimireddy et al., 2020, arXiv 1910.06378, option II).

    Clients take K local steps y ← y − η (∇f_i(y) + c − c_i) from the server's x, set c_i ← c_i − c + (x − y) / (K η),
    and upload y and the change of c_i. The server sets x ← x + η_g mean(y − x) and c ← c + |S| / N mean(Δc_i) over the
    |S| of N clients that uploaded, all with the same weight. Both directions carry twice FedAvg's weights. With a lossy
    codec, c differs from the clients' mean by the codec's rounding.

    (x − y) / (K η) is a mean of gradients for plain SGD only, so that `local_training` takes SGD without momentum,
    schedule and gradient clip. Weight decay counts as part of f_i. DP-SGD is refused: its clip would cut the correction
    along with each example's gradient, and a spent budget would leave steps out.

    Args:
        server_lr: η_g > 0; 1 takes the clients' mean weights as they are.
    """

    name = "scaffold"
    sends = (TensorMessage,)

    def __init__(self, server_lr: float = 1.0):
        if not server_lr > 0:
            raise UserError(f"server_lr must be > 0, got {server_lr}")
        self.optimizer = Average() if server_lr == 1 else SGD(server_lr)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Check the clients' optimisers, and start with a control variate of zeros."""
        for client in clients:
            _check(client)
        state = module_state(server.student)
        server.state["clients"] = len(clients)
        server.state["control"] = {name: _zeros(state[name]) for name, _ in _trained(server.student, state)}

    def download(self, server: Server, client: int) -> TensorMessage:
        """Return the global weights and control variate, one message for all clients of a round."""
        return server.cached_download(
            "student", lambda: _message(module_state(server.student), server.state["control"])
        )

    def local_update(self, client: Client, download: TensorMessage) -> Requests[TensorMessage | None]:
        """Train with corrected steps; return weights and the change of the client's control variate.

        Returns:
            None where the client has taken no step, for want of samples.
        """
        fit, weights, common = client.local_training, download.groups["weights"], download.groups["control"]
        own = client.state.get("control") or {name: torch.zeros_like(tensor) for name, tensor in common.items()}
        # filled in like weights, the correction gets the module's dtype, device and, where ranks share it, parts
        correction = {n: common[n] - own[n] if n in common else torch.zeros_like(t) for n, t in weights.items()}
        module = client.load(correction, "student")
        anchor = [p.detach().clone() if n in common else torch.zeros_like(p) for n, p in module.named_parameters()]
        module = client.load(weights, "student")
        steps = local_steps(module, client.samples, fit)
        if steps == 0:
            return None
        objective = CorrectedObjective(anchor, is_padding_safe(module.training_step))
        yield FitRequest(module, client.train, fit, objective)
        trained, scale = module_state(module), 1 / (steps * fit.optimizer.args["lr"])
        change = {n: scale * (weights[n] - trained[n].cpu()).to(c.dtype) - c for n, c in common.items()}
        client.state["control"] = {name: own[name] + change[name] for name in common}
        return _message(trained, change)

    def aggregate(self, server: Server) -> WeightedMean:
        """Return a mean of weights and changes, in which all clients have the same weight."""
        return WeightedMean(_message(module_state(server.student), server.state["control"]).groups, by="clients")

    def server_update(self, server: Server, knowledge: MeanTensors) -> dict[str, float]:
        """Move the weights by the server's learning rate, and the control variate by the share of clients."""
        state, share = module_state(server.student), knowledge.clients / server.state["clients"]
        control, change = server.state["control"], knowledge.groups["control"]
        load_into(server.student, self.optimizer.step(state, knowledge.groups["weights"], set(control), {}))
        server.state["control"] = {name: c + share * change[name] for name, c in control.items()}
        return {}


def local_steps(module: nn.Module, samples: int, config: Fit) -> int:
    """Return the number of optimiser steps that a fit takes.

    Args:
        module: what is trained; one with batch normalisation skips a last batch of one sample.
        samples: number of training samples.
        config: gives steps or epochs, and the batch size.
    """
    if samples == 0:
        return 0
    if config.steps is not None:
        return config.steps
    single = samples % config.batch_size == 1 and any(isinstance(part, _BatchNorm) for part in module.modules())
    return (config.epochs or 0) * (-(-samples // config.batch_size) - single)


def _check(client: Client) -> None:
    """Raise a `UserError` that names the key where a client's training is no plain SGD."""
    if client.dp_sgd is not None:
        raise UserError(
            "privacy.training: scaffold does not train under dp_sgd, whose clip would cut the correction along with "
            "each example's gradient; take method fedavg or fedprox"
        )
    fit, where = client.local_training, "local_training"
    allowed = "the control variates of scaffold are mean gradients under SGD alone"
    if fit.optimizer.target != "sgd":
        raise UserError(f"{where}.optimizer: must be sgd, got {fit.optimizer.target}; {allowed}")
    for key in ("momentum", "maximize"):
        if value := fit.optimizer.args.get(key):
            raise UserError(f"{where}.optimizer.args.{key}: must be left out, got {value}; {allowed}")
    if not fit.optimizer.args.get("lr", 0) > 0:
        raise UserError(f"{where}.optimizer.args.lr: must be given, and > 0; scaffold divides by it")
    for key, value in (("scheduler", fit.scheduler), ("gradient_clip", fit.gradient_clip)):
        if value is not None:
            raise UserError(f"{where}.{key}: must be null; {allowed}, at one learning rate and unclipped")


def _trained(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and parameters of what is trained and sent."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad and name in state)


def _zeros(like: Tensor) -> Tensor:
    """Return zeros in the shape of a weight, in host memory and at least float32."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _message(weights: Mapping[str, Tensor], control: Mapping[str, Tensor]) -> TensorMessage:
    return TensorMessage({"weights": weights, "control": control}, kind="scaffold")
