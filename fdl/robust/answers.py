"""Robust aggregation of predictions for the proxy set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from fdl.engine.runtime import seed_everything
from fdl.errors import UserError
from fdl.knowledge.aggregation.means import AggregatedResponses, ResponseMean, Space
from fdl.messages import Responses
from fdl.participants import Server
from fdl.robust.base import Plain, RobustRule
from fdl.robust.parameters import own_samples
from fdl.robust.votes import BLOCK_ELEMENTS, ClientUpdates, UpdateBlock, cap_shares, log_client_weights
from fdl.utils.seeding import stream_seed, torch_stream

log = logging.getLogger("fdl")


class RobustAnswers(ResponseMean):
    """Robust aggregate of the clients' predictions, per row of the proxy set, over the clients that predict the row.

    Answers are taken as displacements from "all classes alike": probabilities less 1/C, logits less their mean over
    classes, which changes no probability. A client's share of a row is the softmax of the log-weights, cut as the rule
    says. All answers are kept, 4 bytes a number. Rows that too few answered for the rule count as not answered. How
    much each client counted, against the mean by confidence alone, is logged under ``robust/weight/<client>``.

    Args:
        rule: who counts for how much.
        server: whose labelled samples and state the rule may use.
        space: as for the mean.
        weighted: as for the mean.
    """

    def __init__(self, rule: RobustRule, server: Server, space: Space = "probabilities", weighted: bool | None = None):
        super().__init__(len(server.proxy), server.num_classes, space, weighted, cap=None)  # the rule has its own
        self._rule, self._server = rule, server
        self._held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @staticmethod
    def check(beside: Mapping[str, object], noisy_mean: bool) -> None:
        """Reject settings with which Byzantine clients would bypass the rule.

        Args:
            beside: options by name, None where one is off.
            noisy_mean: whether the server adds noise to a mean.

        Raises:
            UserError: naming the option.
        """
        for option, value in beside.items():
            if value is not None:
                raise UserError(f"robust guards the answers that all learn from, and {option} would go around it")
        if noisy_mean:
            raise UserError("robust and release by the server: its noise covers a mean, and no other rule")

    def add(self, responses: Responses, client: int) -> None:
        """Keep one client's predictions; arguments and errors as for the mean."""
        rows, log_weights, values = self.checked(responses)
        places = torch.full((self.n_rows,), len(rows), dtype=torch.int32)
        places[rows] = torch.arange(len(rows), dtype=torch.int32)
        none = torch.zeros(1, self.num_classes)
        self._held[client] = places, torch.cat([self._displaced(values).float(), none]), log_weights.float()
        self.clients += 1

    def merge(self, other: RobustAnswers) -> None:
        """Take in what another aggregate of the same proxy set holds."""
        self._held.update(other._held)
        self.clients = len(self._held)

    def result(self) -> AggregatedResponses | None:
        """Return the aggregated predictions; None if no row has any."""
        if not self._held:
            return None
        clients = sorted(self._held)
        rule = Plain(max_client_share=None) if self._server.runtime.is_dry_run else self._rule
        bounded = self.space == "probabilities"
        ballot = ClientUpdates(clients, self._server, self._votes, cache(self._reference), bounded, memory="answers")
        decision = rule.decide(ballot)
        decided = decision.decided
        if not decided.any():
            log.warning(
                "round %d: robust rule %s leaves nothing of %d clients' answers; it needs %d a row",
                *(self._server.round, rule.name, len(clients), rule.min_clients),
            )
            return None
        logs = torch.stack([self._log_weights(client) for client in clients]).double()
        log_client_weights(ballot, decision, cap_shares(logs, None))
        values = decision.values
        if bounded:
            values = (values + 1 / self.num_classes).clamp(0, 1)
            total = values.sum(1, keepdim=True)
            values = (values / total.where(total > 0, 1.0)).where(
                decided.unsqueeze(1) & (total > 0), 1 / self.num_classes
            )
        coverage = torch.isfinite(logs).sum(0).where(decided, 0)
        # as the logarithm of the sum where all are equally confident; no liar alone can raise it
        weights = decision.weights / decision.weights.sum(0).where(decided, 1.0)
        level = (weights * logs.where(weights > 0, 0.0)).sum(0)
        log_weight = (level + coverage.double().log()).where(decided, -torch.inf)
        return AggregatedResponses.of(values, self.space, coverage, log_weight)

    def _votes(self, max_client_share: float | None) -> Iterator[UpdateBlock]:
        clients = sorted(self._held)
        logs = torch.stack([self._log_weights(client) for client in clients]).double()
        shares, answered = cap_shares(logs, max_client_share), torch.isfinite(logs)
        height = max(BLOCK_ELEMENTS // (len(clients) * max(self.num_classes, len(clients))), 1)
        for start in range(0, self.n_rows, height):
            rows = slice(start, start + height)

            def blocks(rows: slice = rows) -> Iterator[Tensor]:
                held = (self._held[client] for client in clients)
                yield torch.stack([values[places[rows]] for places, values, _ in held]).double()

            yield UpdateBlock(shares[:, rows], answered[:, rows], blocks)

    def _log_weights(self, client: int) -> Tensor:
        """Of all rows, float32 [n_rows]; -inf where it did not answer."""
        places, _, own = self._held[client]
        return torch.cat([own, torch.full((1,), -torch.inf)])[places]

    def _displaced(self, values: Tensor) -> Tensor:
        """Answers as displacements from all classes alike."""
        return values - 1 / self.num_classes if self.space == "probabilities" else values - values.mean(1, keepdim=True)

    def _reference(self) -> Tensor:
        """Predict with a model trained on the server's labelled samples only.

        It begins with weights of its own, so that no client has had a part in it, and is the same in every round.
        """
        server = self._server
        if "robust/reference" not in server.cache:
            seed_everything(server.seed, "robust/reference")
            module = server.runtime.create("student", stream_seed(server.seed, "robust/init"))
            stream = torch_stream(server.seed, "robust/reference")
            server.runtime.fit(module, own_samples(server), server.local_training, stream)
            server.cache["robust/reference"] = server.predict(module, server.proxy)
        logits = server.cache["robust/reference"].double()
        return self._displaced(logits if self.space == "logits" else torch.softmax(logits, dim=1))
