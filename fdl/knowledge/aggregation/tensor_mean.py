"""Weighted mean of any named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.messages import Parameters, TensorMessage
from fdl.utils.arguments import one_of

if TYPE_CHECKING:
    from fdl.engine.distributed.process_group import ProcessGroup


class MeanTensors(NamedTuple):
    """Mean of the uploads of one round.

    Attributes:
        groups: tensors by name, by group, in the shapes and dtypes of `WeightedMean.like`.
        clients: number of uploads.
        samples: total number of examples that their senders trained on.
    """

    groups: dict[str, dict[str, Tensor]]
    clients: int
    samples: int


class WeightedMean(Aggregate):
    """Mean over clients of all tensors of their `TensorMessage`: ``Σ w_k x_k / Σ w_k``.

    Sums are float64: 8 bytes per number, whatever the number of clients. Integers and booleans, e.g. BatchNorm's count
    of batches, are not averaged: the largest value is kept.

    Args:
        like: groups of named tensors, whose names, shapes and kinds of numbers every upload must match.
        by: ``"samples"`` weights a client by the examples that it trained on, ``"clients"`` weights all alike.
    """

    def __init__(self, like: Mapping[str, Mapping[str, Tensor]], by: Literal["samples", "clients"] = "samples"):
        self._by = one_of("by", by, ("samples", "clients"))
        self._names = {group: list(tensors) for group, tensors in like.items()}
        self._mean = ParameterMean(_flat(like))
        self.clients = self.samples = 0

    def add(self, message: Any, client: int) -> None:
        """Add one client's tensors.

        Args:
            message: a `TensorMessage`; with the number of samples, > 0, where the mean is weighted by it.
            client: id of the sender.

        Raises:
            RejectedMessageError: the message does not fit; the mean is unchanged.
        """
        if not isinstance(message, TensorMessage):
            raise RejectedMessageError(f"expected groups of tensors, got {message.kind}")
        unknown, missing = message.groups.keys() - self._names.keys(), self._names.keys() - message.groups.keys()
        if unknown or missing:
            raise RejectedMessageError(f"groups missing: {sorted(missing)[:3]}, unknown: {sorted(unknown)[:3]}")
        self._mean.add(Parameters(_flat(message.groups), message.samples if self._by == "samples" else 1), client)
        self.clients += 1
        self.samples += message.samples

    def merge(self, other: WeightedMean) -> None:
        """Add another mean.

        Args:
            other: a mean of the same tensors and weighting over other clients.

        Raises:
            ValueError: its weighting differs.
        """
        if self._by != other._by:
            raise ValueError(f"a mean by {self._by} and one by {other._by} do not merge")
        self._mean.merge(other._mean)
        self.clients += other.clients
        self.samples += other.samples

    def reduce(self, ranks: ProcessGroup) -> None:
        """Combine this mean with its counterparts on all other ranks; a collective call.

        Args:
            ranks: the processes.
        """
        self._mean.reduce(ranks)
        counts = torch.tensor([self.clients, self.samples])
        ranks.sum(counts)
        self.clients, self.samples = counts.tolist()

    def result(self) -> MeanTensors | None:
        """The mean; None without uploads."""
        mean = self._mean.result()
        if mean is None:
            return None
        groups = {group: {name: mean[f"{group}/{name}"] for name in names} for group, names in self._names.items()}
        return MeanTensors(groups, self.clients, self.samples)


def _flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
