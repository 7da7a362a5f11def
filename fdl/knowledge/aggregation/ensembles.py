"""Ensembles of the clients' models, which predict the proxy set at the server as uploads arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.means import ParameterMean, ResponseMean
from fdl.knowledge.aggregation.shares import Cap
from fdl.messages import Bundle, Message, Parameters, Responses, Scores, parts_of
from fdl.participants import Server
from fdl.state.weights import load_into

ABOVE_CHANCE = 1.2
"""Least accuracy of a teacher, in multiples of chance, where weak teachers are dropped; the published code's value."""


class MeanAndEnsemble(Aggregate):
    """Streaming mean of the clients' weights, and of their models' probabilities on the proxy set.

    Args:
        mean: mean of the weights, still empty.
        server: predicts its proxy set with each client's model, and at the end with its student.
        temperature: T > 0 of the softmax.
    """

    def __init__(self, mean: ParameterMean, server: Server, temperature: float):
        self.mean, self.server, self.temperature = mean, server, temperature
        self.sum: Tensor | None = None
        self.models = 0

    def add(self, message: Parameters, client: int) -> None:
        """Predict the proxy set with one client's model, and add weights and predictions to the means.

        Args:
            message: the client's weights.
            client: id of the client.

        Raises:
            RejectedMessageError: the weights do not fit, or their predictions are not finite; the means are unchanged.
        """
        self.mean.check(message)
        with self.server.runtime.borrow("student", message.tensors) as module:
            probabilities = self._predict(module)
        if not torch.isfinite(probabilities).all():
            raise RejectedMessageError("its model's answers to the proxy set are not finite")
        self.mean.add(message, client)
        self.sum = probabilities if self.sum is None else self.sum + probabilities
        self.models += 1

    def result(self) -> tuple[Mapping[str, Tensor], Tensor] | None:
        """The mean of the weights, and the mean of all models' probabilities at T, the global model's included."""
        if self.sum is None:
            return None
        probabilities = (self.sum + self._predict(self.server.student)) / (self.models + 1)
        return self.mean.result(), probabilities.float()

    def _predict(self, module: nn.Module) -> Tensor:
        logits = self.server.predict(module, self.server.proxy)
        return torch.softmax(logits.double() / self.temperature, dim=1)


class GroupEnsemble(Aggregate):
    """Streaming means of the weights of several architectures, and of all clients' logits on the proxy set.

    Args:
        server: predicts its proxy set with each client's model.
        group_of: maps a client's id to its group, the architecture that it uploads.
        weights_of: maps a group to the names, shapes and dtypes of its model.
        drop_worst: leave clients that do no better than chance on validation data out of the mean of logits.
        weighted: whether clients upload confidences, by which logits are weighted.
        cap: the most weight that one client may have; None for no limit.
    """

    def __init__(
        self,
        server: Server,
        group_of: Callable[[int], str],
        weights_of: Callable[[str], Mapping[str, Tensor]],
        drop_worst: bool,
        weighted: bool,
        cap: Cap | None,
    ):
        self.server, self.group_of, self.weights_of, self.drop_worst = server, group_of, weights_of, drop_worst
        self.means: dict[str, ParameterMean] = {}
        # sums of logits and numbers of clients: of teachers (True), and of dropped clients (False)
        self.sums: dict[bool, Tensor] = {}
        self.counts = {True: 0, False: 0}
        self.expected = {Parameters, Scores} if weighted else {Parameters}
        # the same where teachers are weighted
        self.weighted: dict[bool, ResponseMean] = {}
        if weighted:
            make = partial(ResponseMean, len(server.proxy), server.num_classes, "logits", True, cap)
            self.weighted = {True: make(), False: make()}

    def add(self, upload: Message | Bundle, client: int) -> None:
        """Predict the proxy set with one client's model, and add weights and logits to the means.

        Args:
            upload: the client's weights, bundled with scores where the ensemble is `weighted`.
            client: id of the client.

        Raises:
            RejectedMessageError: the upload does not fit, or its predictions are not finite; the means are unchanged.
        """
        parts = parts_of(upload)
        if parts.keys() != self.expected:
            expected, got = (" and ".join(sorted(kind.kind for kind in kinds)) for kinds in (self.expected, parts))
            raise RejectedMessageError(f"expected {expected}, got {got}")
        message = parts[Parameters]
        group = self.group_of(client)
        with self.server.runtime.borrow(group) as module:
            try:
                load_into(module, message.tensors)
            except ValueError as error:
                raise RejectedMessageError(str(error)) from error
            logits = self.server.predict(module, self.server.proxy)
            if not torch.isfinite(logits).all():
                raise RejectedMessageError("its model's answers to the proxy set are not finite")
            teaches = not self.drop_worst or self._beats_chance(module)
        if self.weighted:
            answers = Responses(logits, "logits", confidence=parts[Scores].confidence)
            self.weighted[teaches].checked(answers)
        if group not in self.means:
            self.means[group] = ParameterMean(self.weights_of(group))
        self.means[group].add(message, client)
        if self.weighted:
            self.weighted[teaches].add(answers, client)
        else:
            self.sums[teaches] = self.sums[teaches] + logits if teaches in self.sums else logits
        self.counts[teaches] += 1

    def result(self) -> tuple[dict[str, Any], Tensor, int] | None:
        """Mean weights by group, the teachers' mean logits [n, C], and the number of clients in these; or None.

        Where every client was dropped, the logits are the mean over all of them.
        """
        if not self.means:
            return None
        teach = self.counts[True] > 0
        averages = {group: mean.result() for group, mean in self.means.items()}
        logits = self.weighted[teach].result().values if self.weighted else self.sums[teach] / self.counts[teach]
        return averages, logits, self.counts[teach]

    def _beats_chance(self, module: LightningModule) -> bool:
        labels = self.server.validation.labels
        right = (self.server.predict(module, self.server.validation).argmax(1) == labels).float().mean()
        return float(right) >= ABOVE_CHANCE / self.server.num_classes
