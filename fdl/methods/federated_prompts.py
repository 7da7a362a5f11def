"""Federated averaging of some of what is trained, while the rest belongs to each site."""

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
    """FedAvg of shared prompts, beside which every site keeps prompts of its own (PromptFL, Guo et al., 2022).

    What is sent is what the student trains: of a module around a frozen backbone, prompts alone. Of these, whatever
    `personal_parameters` matches never leaves its site, where it is trained together with the shared part (as the
    layers of FedPer, Arivazhagan et al., 2019, which can be named as well). With nothing personal this is FedAvg. The
    student at the server has the personal part that it began with; each site's own model is evaluated as well.

    Args:
        personal_parameters: names or globs of the student's tensors that stay at the site.
        optimizer: what the server does with the mean of the shared part; None takes it as it is.
        robust: as in FedAvg.

    Raises:
        UserError: when a pattern matches nothing, or nothing is left to share.
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
        """See that the patterns fit the student."""
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
        """The shared part of the global weights, the same message for all clients of a round."""
        return server.cached_download("student", lambda: Parameters(self._shared(module_state(server.student))))

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train both parts on private data, keep the personal one, return the shared one."""
        if not self.personal_parameters:
            return (yield from super().local_update(client, download))
        module = client.specialist()  # at first a fresh one, whose personal part nobody else has
        load_into(module, {**module_state(module), **download.tensors})
        yield FitRequest(module, client.train, client.local_training, self.objective(module))
        client.save_specialist(module)
        return Parameters(self._shared(module_state(module)), samples=client.reported_samples)

    def aggregate(self, server: Server) -> ParameterMean | RobustParameters:
        """A mean weighted by sample counts, or what is robust."""
        return self.mean(server, self._shared(module_state(server.student)))

    def server_update(self, server: Server, knowledge: Mapping[str, Tensor]) -> dict[str, float]:
        """Move the shared part towards, or with a plain average onto, the clients' mean."""
        own = module_state(server.student)
        shared = self._shared(own)
        trained = {name for name, _ in server.student.named_parameters() if name in shared}
        moments = server.state.setdefault("optimizer", {})
        tensors = self.optimizer.step(shared, knowledge, trained, moments)
        load_into(server.student, {**own, **tensors} if self.personal_parameters else tensors)
        return {}

    def _shared(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the server and all clients see of a model's state."""
        if not self.personal_parameters:
            return tensors
        return {
            k: v for k, v in tensors.items() if not any(fnmatchcase(k, pattern) for pattern in self.personal_parameters)
        }
