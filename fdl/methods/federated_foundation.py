"""A foundation model's life cycle: training on public data at the server and on private data at the sites, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fdl.engine.requests import Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.knowledge.aggregation.server_optimizers import ServerOptimizer
from fdl.knowledge.distillation.phase_schedule import CENTRALIZED, FEDERATED, PhaseSchedule, PlateauPhases
from fdl.messages import Message, Parameters
from fdl.methods.fedavg import FedAvg
from fdl.participants import Client, Server
from fdl.robust.base import RobustRule
from fdl.robust.parameters import RobustParameters

_FIRST = {"pre_training": CENTRALIZED, "fine_tuning": FEDERATED}


class FederatedFoundation(FedAvg):
    """Phases of centralised training on the server's public labelled data and of FedAvg alternate (arXiv 2305.11414).

    A round is one step of the phase that it belongs to: in a centralised one the server trains the student with the
    recipe's `server_distil` settings on its own samples, and nothing is sent; in a federated one clients train and send
    what the student's `tuning` makes trainable, all of it, low-rank updates or the head, with the recipe's
    `local_training` settings. With a switch that never switches these are training at the server alone and FedAvg. A
    federated round in which nobody is heard does not count towards its phase.

    Args:
        mode: the phase to begin with: ``"pre_training"`` on public data, for a model that is new, or
            ``"fine_tuning"`` on private data, for one that is pretrained.
        switch: when a phase ends: ``"plateau"``, ``"fixed_phases"`` or ``"single_phase"``; None is a plateau with
            its defaults.
        optimizer: what the server does with the clients' mean; None takes it as it is.
        robust: as in FedAvg.
    """

    name = "federated_foundation"
    requires = ("student", "public")

    def __init__(
        self,
        mode: Literal["pre_training", "fine_tuning"] = "pre_training",
        switch: PhaseSchedule | None = None,
        optimizer: ServerOptimizer | None = None,
        robust: RobustRule | None = None,
    ):
        super().__init__(optimizer, robust)
        if mode not in _FIRST:
            raise UserError(f"mode must be one of {', '.join(_FIRST)}, got {mode!r}")
        self.first, self.switch = _FIRST[mode], switch or PlateauPhases()

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Begin the first phase."""
        server.state["phase"] = {"name": self.first, "rounds": 0, "memory": {}}

    def download(self, server: Server, client: int) -> Message | None:
        """The global weights in a federated phase, nothing in a centralised one."""
        return super().download(server, client) if self._federated(server) else None

    def local_update(self, client: Client, download: Parameters | None) -> Requests[Parameters | None]:
        """Train the global model on private data; without one there is nothing to do."""
        return None if download is None else (yield from super().local_update(client, download))

    def aggregate(self, server: Server) -> ParameterMean | RobustParameters | None:
        """A mean weighted by sample counts, or what is robust, in a federated phase."""
        return super().aggregate(server) if self._federated(server) else None

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Take the clients' mean, or train on public data; then see whether the next round is of the other phase."""
        federated = self._federated(server)
        if federated:
            super().server_update(server, knowledge)
        else:
            server.fit(server.student, server.public, server.server_distil)
        return {"phase": float(federated)} | self._advance(server)

    def _federated(self, server: Server) -> bool:
        """Whether the round is of a federated phase; rehearsed is one, where any is to come."""
        rehearsed = server.runtime.is_dry_run and self.switch.alternates
        return rehearsed or server.state["phase"]["name"] == FEDERATED

    def _advance(self, server: Server) -> dict[str, float]:
        """Count the round, and switch if it was the phase's last; returns what the switch has seen."""
        phase = server.state["phase"]
        name, rounds, memory = phase["name"], phase["rounds"] + 1, dict(phase["memory"])
        if self.switch.is_over(server, name, rounds, memory):
            other = CENTRALIZED if name == FEDERATED else FEDERATED
            server.state["phase"] = {"name": other, "rounds": 0, "memory": self.switch.carry_over(memory)}
        else:
            server.state["phase"] = {"name": name, "rounds": rounds, "memory": memory}
        return self.switch.log(memory)
