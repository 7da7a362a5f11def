"""A method: SCAFFOLD (Karimireddy et al., 2020), whose clients exchange control variates beside their weights.

python -m fdl fit --recipe examples/scaffold.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.tensor_mean import MeanTensors, WeightedMean
from fdl.messages import TensorMessage
from fdl.methods.base import Method
from fdl.modules.objectives import PenalizedObjective
from fdl.participants import Client, Server
from fdl.state.weights import load_into, module_state


@dataclass(eq=False)
class Corrected(PenalizedObjective):
    """The module's own loss plus <w, c - c_i>: its gradient is what SCAFFOLD adds to every step."""

    anchor: list[Tensor]

    def penalty(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        """Return the sum of products of weights and correction."""
        return torch.stack([(p * a).sum() for p, a in zip(parameters, anchor)]).sum()


class Scaffold(Method):
    """SCAFFOLD with option II for the control variates and a server step of 1; `local_training` must be plain SGD."""

    name = "scaffold_example"
    sends = (TensorMessage,)

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Begin with control variates of zero."""
        server.state["clients"] = len(clients)
        server.state["control"] = {n: torch.zeros_like(p, device="cpu") for n, p in _parameters(server.student)}

    def download(self, server: Server, client: int) -> TensorMessage:
        """The global weights and control variate, the same message for all clients of a round."""
        return server.cached_download("all", lambda: _message(module_state(server.student), server.state["control"]))

    def local_update(self, client: Client, download: TensorMessage) -> Requests[TensorMessage]:
        """Train with corrected steps; return the weights and the change of the client's own control variate."""
        fit, common = client.local_training, download.groups["control"]
        if fit.optimizer.target != "sgd" or fit.optimizer.args.get("momentum"):
            raise UserError("scaffold: local_training.optimizer must be sgd without momentum")
        module = client.load(download.groups["weights"], "student")
        before = {n: p.clone() for n, p in _parameters(module)}
        own = client.state.get("control") or {n: torch.zeros_like(c) for n, c in common.items()}
        correction = Corrected([(common[n] - own[n]).to(p) for n, p in _parameters(module)])
        yield FitRequest(module, client.train, fit, correction)  # computed for several clients in one pass
        steps = fit.steps if fit.steps is not None else fit.epochs * -(-client.samples // fit.batch_size)
        scale = 1 / (max(steps, 1) * fit.optimizer.args["lr"])
        change = {n: scale * (before[n] - p).cpu() - common[n] for n, p in _parameters(module)}
        client.state["control"] = {n: own[n] + change[n] for n in own}
        return _message(module_state(module), change, client.reported_samples)

    def aggregate(self, server: Server) -> WeightedMean:
        """A mean of weights and changes, in which all clients count alike."""
        return WeightedMean(_message(module_state(server.student), server.state["control"]).groups, by="clients")

    def server_update(self, server: Server, knowledge: MeanTensors) -> dict[str, float]:
        """Take the mean weights, and move the control variate by the share of clients that were heard."""
        load_into(server.student, knowledge.groups["weights"])
        share, change = knowledge.clients / server.state["clients"], knowledge.groups["control"]
        server.state["control"] = {n: c + share * change[n] for n, c in server.state["control"].items()}
        return {}


def _parameters(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in module.named_parameters()]


def _message(weights: Mapping[str, Tensor], control: Mapping[str, Tensor], samples: int = 0) -> TensorMessage:
    return TensorMessage({"weights": weights, "control": control}, samples, kind="scaffold")
