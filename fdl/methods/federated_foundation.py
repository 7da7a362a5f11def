"""A foundation model's life cycle: training at the server on public data alternates with training at the sites."""

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

_FIRST_PHASES = {"pre_training": CENTRALIZED, "fine_tuning": FEDERATED}


class FederatedFoundation(FedAvg):
    """Centralised training on public labelled data alternates with FedAvg in phases (arXiv 2305.11414).

    A round is one step of the phase that it belongs to: in a centralised one the server trains the student with the
    recipe's `server_distil` settings on its own samples, and nothing is sent; in a federated one clients train and
    upload the student's trainable part (`tuning`: everything, low-rank updates or the head), with the recipe's
    `local_training` settings. With a schedule that never switches, these are training at the server alone and FedAvg.
    A federated round without uploads does not count towards its phase.

    Args:
        mode: first phase: ``"pre_training"`` on public data, for a new model, or ``"fine_tuning"`` on private data, for
            a pretrained one.
        switch: schedule that ends a phase: ``"plateau"``, ``"fixed_phases"`` or ``"single_phase"``; None is a plateau
            with its defaults.
        optimizer: server optimiser, applied to the clients' mean; None takes the mean as the new weights.
        robust: robust aggregation rule instead of the mean; None is the mean.
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
        if mode not in _FIRST_PHASES:
            raise UserError(f"mode must be one of {', '.join(_FIRST_PHASES)}, got {mode!r}")
        self.first_phase, self.switch = _FIRST_PHASES[mode], switch or PlateauPhases()

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Start the first phase."""
        server.state["phase"] = {"name": self.first_phase, "rounds": 0, "memory": {}}

    def download(self, server: Server, client: int) -> Message | None:
        """Return the global weights in a federated phase, None in a centralised one."""
        return super().download(server, client) if self._is_federated(server) else None

    def local_update(self, client: Client, download: Parameters | None) -> Requests[Parameters | None]:
        """Train the global model on private data; return None in a centralised phase."""
        return None if download is None else (yield from super().local_update(client, download))

    def aggregate(self, server: Server) -> ParameterMean | RobustParameters | None:
        """Return FedAvg's aggregate in a federated phase, None in a centralised one."""
        return super().aggregate(server) if self._is_federated(server) else None

    def server_update(self, server: Server, knowledge: Any) -> dict[str, float]:
        """Take the clients' mean or train on public data, then switch phases if this one is over."""
        federated = self._is_federated(server)
        if federated:
            super().server_update(server, knowledge)
        else:
            server.fit(server.student, server.public, server.server_distil)
        return {"phase": float(federated)} | self._advance(server)

    def _is_federated(self, server: Server) -> bool:
        """Return True in a federated phase, and in a dry run if there will be one."""
        expected = server.runtime.is_dry_run and self.switch.alternates
        return expected or server.state["phase"]["name"] == FEDERATED

    def _advance(self, server: Server) -> dict[str, float]:
        """Count the round, switch if it was the phase's last, and return the schedule's numbers to log."""
        phase = server.state["phase"]
        name, rounds, memory = phase["name"], phase["rounds"] + 1, dict(phase["memory"])
        if self.switch.is_over(server, name, rounds, memory):
            other = CENTRALIZED if name == FEDERATED else FEDERATED
            server.state["phase"] = {"name": other, "rounds": 0, "memory": self.switch.carry_over(memory)}
        else:
            server.state["phase"] = {"name": name, "rounds": rounds, "memory": memory}
        return self.switch.log(memory)
