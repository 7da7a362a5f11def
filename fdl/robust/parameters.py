"""Robust aggregation of weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from fdl.datamodules.samples import Samples
from fdl.errors import UserError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.messages import Parameters
from fdl.participants import Server
from fdl.robust.base import Plain, RobustRule
from fdl.robust.votes import BLOCK_ELEMENTS, ClientUpdates, UpdateBlock, log_client_weights
from fdl.state.weights import module_state

log = logging.getLogger("fdl")


class RobustParameters(Aggregate):
    """Robust aggregate of the clients' weights, as displacements from the global model.

    All clients count alike: how many samples it has is what a client says of itself. Every upload is kept, 4 bytes a
    parameter and client. Of integers, e.g. BatchNorm's count of batches, the median is taken. How much each client
    counted is logged under ``robust/weight/<client>``.

    Args:
        rule: who counts for how much.
        server: whose labelled samples and state the rule may use.
        like: the global model's tensors, from which updates start.
        architecture: which of the runtime's templates they belong to.
        what: name of the model in the log, where there are several.
    """

    def __init__(
        self,
        rule: RobustRule,
        server: Server,
        like: Mapping[str, Tensor],
        architecture: str = "student",
        what: str = "",
    ):
        self._layout = ParameterMean(like)  # it sums nothing, it only knows what fits
        self._rule, self._server, self._origin = rule, server, like
        self._architecture, self._what = architecture, what
        self._held: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def add(self, parameters: Parameters, client: int) -> None:
        """Keep one client's parameters; arguments and errors as for a mean."""
        self._layout.check(parameters)
        parameters.validate()
        others = {name: parameters.tensors[name].cpu() for name in self._origin if name not in self._layout.averaged}
        self._held[client] = self._vector(parameters.tensors).float(), others

    def merge(self, other: RobustParameters) -> None:
        """Take in what another aggregate of the same model holds."""
        self._held.update(other._held)

    def result(self) -> Mapping[str, Tensor] | None:
        """Return the new weights by name, in the dtypes of `like`; None if too few uploads or none is trusted."""
        if not self._held:
            return None
        clients = sorted(self._held)
        rule = Plain() if self._server.runtime.is_dry_run else self._rule
        memory = self._what or "parameters"
        ballot = ClientUpdates(clients, self._server, self._votes, cache(self._reference), False, memory)
        decision = rule.decide(ballot)
        if not decision.decided.any():
            reason = "none of the clients is trusted"
            if len(clients) < rule.min_clients:
                reason = f"it needs {rule.min_clients} uploads and got {len(clients)}"
            log.warning("round %d: robust rule %s changes nothing: %s", self._server.round, rule.name, reason)
            return None
        log_client_weights(
            ballot, decision, torch.full((len(clients), 1), 1 / len(clients), dtype=torch.float64), self._what
        )
        moved = self._layout.named(decision.values[0] + self._vector(self._origin).double())
        kept = {
            name: torch.stack([self._held[client][1][name] for client in clients]).long().median(0).values
            for name in self._origin
            if name not in moved
        }
        return {name: (moved | kept)[name].to(like.dtype) for name, like in self._origin.items()}

    def _votes(self, max_client_share: float | None) -> Iterator[UpdateBlock]:
        """One row; confidence does not exist here, so there is no share to cap."""
        vectors = [self._held[client][0] for client in sorted(self._held)]
        origin, count = self._vector(self._origin).double(), len(vectors)
        width = max(BLOCK_ELEMENTS // count, 1)

        def blocks() -> Iterator[Tensor]:
            for start in range(0, len(origin), width):
                here = slice(start, start + width)
                yield torch.stack([vector[here].double() - origin[here] for vector in vectors]).unsqueeze(1)

        shares = torch.full((count, 1), 1 / count, dtype=torch.float64)
        yield UpdateBlock(shares, torch.ones_like(shares, dtype=torch.bool), blocks)

    def _reference(self) -> Tensor:
        """The displacement that the server's own labelled samples give."""
        server, runtime = self._server, self._server.runtime
        whole = dict(self._origin.items())
        if self._architecture == "student":  # what is not sent, as the server has it
            whole = {**module_state(server.student), **whole}
        name = f"robust/{self._what}/server" if self._what else "robust/server"
        with runtime.borrow(self._architecture, whole) as module:
            server.fit(module, own_samples(server), server.local_training, name=name)
            return (self._vector(module_state(module)).double() - self._vector(self._origin).double()).unsqueeze(0)

    def _vector(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """All floating-point numbers in one vector."""
        parts = [tensors[name].detach().cpu().reshape(-1) for name in self._layout.averaged]
        return torch.cat(parts) if parts else torch.zeros(0)


def own_samples(server: Server) -> Samples:
    """Labelled samples of the server that judge clients: the public ones, else those for validation.

    Raises:
        UserError: it has none.
    """
    for samples in (server.public, server.validation):
        if samples is not None and len(samples):
            return samples
    raise UserError("robust: this rule needs labelled samples at the server; set data.args.public or validation")
