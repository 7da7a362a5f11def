"""Federated averaging, with an optimiser at the server."""

from __future__ import annotations

from collections.abc import Mapping

from lightning import LightningModule
from torch import Tensor

from fdl.engine.requests import FitRequest, Requests
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.knowledge.aggregation.server_optimizers import Average, ServerOptimizer
from fdl.messages import Message, Parameters
from fdl.methods.base import Method
from fdl.modules.objectives import Objective
from fdl.participants import Client, Server
from fdl.robust.base import RobustRule
from fdl.robust.parameters import RobustParameters
from fdl.state.weights import load_into, module_state


class FedAvg(Method):
    """Average the clients' weights by their sample counts (McMahan et al., 2017).

    Each client trains the student's architecture from the server's weights; w ← Σ n_k w_k / Σ n_k over the clients
    whose uploads arrived. With a server optimiser the mean displacement is its pseudo-gradient (Reddi et al., 2021).

    Args:
        optimizer: server optimiser, applied to the mean; None takes the mean as the new weights.
        robust: robust aggregation rule instead of the mean, against Byzantine clients; None is the mean.
    """

    name = "fedavg"
    sends = (Parameters,)

    def __init__(self, optimizer: ServerOptimizer | None = None, robust: RobustRule | None = None):
        self.optimizer, self.robust = optimizer or Average(), robust

    def download(self, server: Server, client: int) -> Message:
        """Return the global weights, the same message for all clients of a round."""
        return server.cached_download("student", lambda: Parameters(module_state(server.student)))

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train the global model on private data and return its weights."""
        module = client.load(download.tensors, "student")
        yield FitRequest(module, client.train, client.local_training, self.objective(module))
        return Parameters(module_state(module), samples=client.reported_samples)

    def objective(self, module: LightningModule) -> Objective | None:
        """Return the objective that a client minimises; None for the module's own loss.

        Args:
            module: the client's model, filled with the global weights.
        """
        return None

    def aggregate(self, server: Server) -> ParameterMean | RobustParameters:
        """Return a mean weighted by sample counts, or the robust aggregate."""
        return self.mean(server, module_state(server.student))

    def mean(self, server: Server, like: Mapping[str, Tensor]) -> ParameterMean | RobustParameters:
        """Return an empty aggregate of named tensors, the mean or the robust rule.

        Args:
            server: the server.
            like: the tensors that the result replaces, which set names, shapes and dtypes.
        """
        return ParameterMean(like) if self.robust is None else RobustParameters(self.robust, server, like)

    def server_update(self, server: Server, knowledge: dict) -> dict[str, float]:
        """Move the global weights towards the clients' mean, or onto it without a server optimiser."""
        state, moments = module_state(server.student), server.state.setdefault("optimizer", {})
        trained = {name for name, _ in server.student.named_parameters() if name in state}
        tensors = self.optimizer.step(state, knowledge, trained, moments)
        load_into(server.student, tensors)
        return {}
