"""Federated averaging of shared prompts, with personal parameters that stay at each site."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.knowledge.aggregation.server_optimizers import ServerOptimizer
from fdl.messages import Message, Parameters
from fdl.methods.fedavg import FedAvg
from fdl.participants import Client, Server
from fdl.robust.base import RobustRule
from fdl.robust.parameters import RobustParameters
from fdl.state.weights import load_into, module_state


class FederatedPrompts(FedAvg):
    """FedAvg of shared prompts, with personal prompts that stay at each site (PromptFL, Guo et al., 2022).

    The trainable part of the student is sent: of a module around a frozen backbone, prompts alone. Tensors that match
    `personal_parameters` never leave their site, where they are trained together with the shared part (like the layers
    of FedPer, Arivazhagan et al., 2019, which can be named as well). With nothing personal this is FedAvg. The
    student at the server keeps its initial personal part; each site's own model is evaluated as well.

    Args:
        personal_parameters: names or globs of the student's tensors that stay at the site; None or empty: none.
        optimizer: server optimiser, applied to the mean of the shared part; None takes the mean as the new weights.
        robust: robust aggregation rule instead of the mean; None is the mean.

    Raises:
        UserError: from `setup`, if a pattern matches nothing, or nothing is left to share.
    """

    name = "federated_prompts"

    def __init__(
        self,
        personal_parameters: list[str] | None = None,
        optimizer: ServerOptimizer | None = None,
        robust: RobustRule | None = None,
    ):
        super().__init__(optimizer, robust)
        self.personal_parameters = tuple(personal_parameters or ())

    def setup(self, server: Server, clients: object) -> None:
        """Check that the patterns match tensors of the student."""
        names = list(module_state(server.student))
        for pattern in self.personal_parameters:
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                raise UserError(
                    f"personal_parameters: nothing that the student trains is called {pattern!r}; there are {shown}"
                )
        if not self._shared(module_state(server.student)):
            raise UserError("personal_parameters: nothing is left to share; take method single_site for that")

    def download(self, server: Server, client: int) -> Message:
        """Return the shared part of the global weights, the same message for all clients of a round."""
        return server.cached_download("student", lambda: Parameters(self._shared(module_state(server.student))))

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train both parts on private data, keep the personal one, return the shared one."""
        if not self.personal_parameters:
            return (yield from super().local_update(client, download))
        module = client.specialist()  # new in the first turn, with a personal part that differs from client to client
        load_into(module, {**module_state(module), **download.tensors})
        yield FitRequest(module, client.train, client.local_training, self.objective(module))
        client.save_specialist(module)
        return Parameters(self._shared(module_state(module)), samples=client.reported_samples)

    def aggregate(self, server: Server) -> ParameterMean | RobustParameters:
        """Return a mean of the shared part weighted by sample counts, or the robust aggregate."""
        return self.mean(server, self._shared(module_state(server.student)))

    def server_update(self, server: Server, knowledge: Mapping[str, Tensor]) -> dict[str, float]:
        """Move the shared part towards the clients' mean, or onto it without a server optimiser."""
        own = module_state(server.student)
        shared = self._shared(own)
        trained = {name for name, _ in server.student.named_parameters() if name in shared}
        moments = server.state.setdefault("optimizer", {})
        tensors = self.optimizer.step(shared, knowledge, trained, moments)
        load_into(server.student, {**own, **tensors} if self.personal_parameters else tensors)
        return {}

    def _shared(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the part of a model's state that is sent."""
        if not self.personal_parameters:
            return tensors
        return {
            k: v for k, v in tensors.items() if not any(fnmatchcase(k, pattern) for pattern in self.personal_parameters)
        }
