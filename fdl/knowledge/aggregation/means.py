"""Means of the clients' predictions and parameters.

Both are sums in float64, so that the order in which uploads arrive, or how clients are spread over processes (`merge`),
changes the float32 result by its last bit at most. They stream, so that memory grows with the model or the proxy set
and never with the clients; except for predictions whose weights clients declare and the server caps, which are kept
until all weights of a row are known. A message that does not fit is rejected before anything is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.shares import CAP, Cap
from fdl.knowledge.confidence.base import LIMIT
from fdl.messages import Parameters, Responses
from fdl.state.flat_tensors import FlatTensors, flat_view

if TYPE_CHECKING:
    from fdl.engine.distributed.process_group import ProcessGroup

Space = Literal["probabilities", "logits"]

_SLACK = 1e-3
"""Distance by which rounding in transit may carry a probability or a log-weight out of its range."""


@dataclass(frozen=True, eq=False)
class AggregatedResponses:
    """Aggregated predictions of a round's clients, one row per proxy sample.

    Attributes:
        values: float32 [n, C], probabilities or logits; uniform in rows without a prediction.
        form: which of the two.
        coverage: int64 [n], number of clients that predicted each row.
        log_weight: float32 [n], logarithm of the sum of their weights; -inf in rows without a prediction. With a
            density confidence it measures how similar a row is to any client's data.
        agreement: float32 [n] in [0, 1]: 1 - H(p)/log C of the mean p; 1 where all clients are certain of one class, 0
            where the mean is uniform.
    """

    values: Tensor
    form: Space
    coverage: Tensor
    log_weight: Tensor
    agreement: Tensor

    @classmethod
    def of(cls, values: Tensor, form: Space, coverage: Tensor, log_weight: Tensor) -> AggregatedResponses:
        """Aggregated predictions with the agreement computed from their values.

        Args:
            values: [n, C], probabilities or logits, of any real dtype.
            form: which of the two.
            coverage: int64 [n], number of clients that predicted each row.
            log_weight: [n], logarithm of the sum of their weights, of any real dtype.
        """
        p = values if form == "probabilities" else torch.softmax(values, dim=1)
        most = torch.tensor(float(values.shape[1])).log().clamp_min(torch.finfo(torch.float32).tiny)
        agreement = (1 - torch.special.entr(p).sum(1) / most).clamp(0, 1)
        return cls(values.float(), form, coverage, log_weight.float(), agreement.float())

    @property
    def probabilities(self) -> Tensor:
        """The values as probabilities, float32 [n, C]."""
        return self.values if self.form == "probabilities" else torch.softmax(self.values, dim=1)


class ResponseMean(Aggregate):
    """Mean over clients of their proxy-set predictions, each row weighted by the softmax over clients of log-weights.

    A client declares its log-weights itself. With a cap, no client has more than a multiple of an equal share of a
    round (`shares.Cap`), whatever it declares. The cap can be applied only once all uploads have arrived: messages are
    kept until then, K n (C + 1) numbers for K clients. Without a cap, or with uniform weights, the mean streams: the
    softmax is computed online, with the largest log-weight of each row so far, and sums relative to it.

    Args:
        n_rows: size of the proxy set.
        num_classes: number of classes C.
        space: average probabilities (DS-FL), where one client can move a row by no more than √2 times its share, or
            logits (FedMD, FedDF), where an over-confident client counts for more.
        weighted: True rejects predictions without confidence, False rejects those with one. None accepts both;
            predictions without confidence then have log-weight 0.
        cap: the most weight that one client may have; None for no limit.
    """

    def __init__(
        self,
        n_rows: int,
        num_classes: int,
        space: Space = "probabilities",
        weighted: bool | None = None,
        cap: Cap | None = CAP,
    ):
        self.n_rows, self.num_classes, self.space, self.weighted = n_rows, num_classes, space, weighted
        self.cap = None if weighted is False else cap
        self.clients = 0
        self._pending: list[tuple[int, Responses]] = []
        self._largest = torch.full((n_rows,), -torch.inf, dtype=torch.float64)
        self._weight = torch.zeros(n_rows, dtype=torch.float64)
        self._values = torch.zeros(n_rows, num_classes, dtype=torch.float64)
        self._coverage = torch.zeros(n_rows, dtype=torch.int64)

    def add(self, responses: Responses, client: int) -> None:
        """Add one client's predictions.

        Args:
            responses: logits or probabilities for some rows or all; converted to `space`.
            client: id of the sender.

        Raises:
            RejectedMessageError: the predictions do not fit; the mean is unchanged.
        """
        rows, log_weights, values = self.checked(responses)
        if self.cap is None:
            self._accumulate(rows, log_weights, torch.ones_like(log_weights), values, torch.ones_like(rows))
        else:
            self._pending.append((client, responses))
        self.clients += 1

    def checked(self, responses: Responses) -> tuple[Tensor, Tensor, Tensor]:
        """Check a message, and convert it to this mean's space.

        Args:
            responses: predictions of one client.

        Returns:
            Rows, int64 [m], log-weights, float64 [m], and values, float64 [m, C].

        Raises:
            RejectedMessageError: the predictions do not fit.
        """
        if not isinstance(responses, Responses):
            raise RejectedMessageError(f"expected responses, got {responses.kind}")
        values, rows = self._checked_values(responses), self._checked_rows(responses)
        return rows, self._checked_log_weights(responses), values

    def merge(self, other: ResponseMean) -> None:
        """Add another mean.

        Args:
            other: a mean of the same settings over other clients, e.g. of another process.

        Raises:
            ValueError: its settings differ.
        """
        if _settings(self) != _settings(other):
            raise ValueError(f"means of {_settings(self)} and {_settings(other)} do not merge")
        self._pending += other._pending
        rows = torch.arange(self.n_rows)[other._coverage > 0]
        self._accumulate(rows, other._largest[rows], other._weight[rows], other._values[rows], other._coverage[rows])
        self.clients += other.clients

    def result(self) -> AggregatedResponses | None:
        """The mean; None without uploads."""
        if self.clients == 0:
            return None
        if self._pending:
            return self._capped().result()
        answered = self._coverage > 0
        values = self._values / self._weight.where(answered, 1.0).unsqueeze(1)
        if self.space == "probabilities":
            values = values.where(answered.unsqueeze(1), 1 / self.num_classes)
        return AggregatedResponses.of(values, self.space, self._coverage.clone(), self._largest + self._weight.log())

    def _capped(self) -> ResponseMean:
        """The mean of all pending messages, with capped log-weights."""
        told = [message for _, message in sorted(self._pending, key=lambda waiting: waiting[0])]
        logs = torch.full((len(told), self.n_rows), -torch.inf, dtype=torch.float64)
        for own, message in zip(logs, told):
            own[self._checked_rows(message)] = self._checked_log_weights(message)
        mean = ResponseMean(self.n_rows, self.num_classes, self.space, self.weighted, cap=None)
        for own, message in zip(self.cap.limit(logs), told):
            rows, values = self._checked_rows(message), self._checked_values(message)
            weight = torch.ones(len(rows), dtype=torch.float64)
            mean._accumulate(rows, own[rows], weight, values, torch.ones_like(rows))
        mean.clients = self.clients
        return mean

    def _accumulate(self, rows: Tensor, largest: Tensor, weight: Tensor, values: Tensor, coverage: Tensor) -> None:
        """Add sums relative to exp(largest); the smaller side is rescaled."""
        together = torch.maximum(self._largest[rows], largest)
        before, new = (self._largest[rows] - together).exp(), (largest - together).exp()
        self._weight[rows] = self._weight[rows] * before + weight * new
        self._values[rows] = self._values[rows] * before.unsqueeze(1) + values * new.unsqueeze(1)
        self._largest[rows] = together
        self._coverage[rows] += coverage

    def _checked_values(self, responses: Responses) -> Tensor:
        """The predictions in this mean's space, float64 [m, C]."""
        values = responses.values
        if responses.form not in ("logits", "probabilities"):
            raise RejectedMessageError(f"expected logits or probabilities, got {responses.form}")
        if values.ndim != 2 or values.shape[1] != self.num_classes:
            raise RejectedMessageError(f"expected answers [n, {self.num_classes}], got {list(values.shape)}")
        values = values.detach().to("cpu", torch.float64)
        if not torch.isfinite(values).all():
            raise RejectedMessageError("an answer is not finite")
        if responses.form == "logits":
            return values if self.space == "logits" else torch.softmax(values, dim=1)
        values = _on_simplex(values)
        # the floor is float32's resolution: a class that was rounded to 0 is unlikely, not impossible
        return values if self.space == "probabilities" else values.clamp_min(torch.finfo(torch.float32).eps).log()

    def _checked_rows(self, responses: Responses) -> Tensor:
        """The rows of the proxy set that were predicted, int64 [m]."""
        rows, count = responses.rows, len(responses.values)
        if rows is None:
            if count != self.n_rows:
                raise RejectedMessageError(f"expected answers to all {self.n_rows} proxy rows, got {count}")
            return torch.arange(self.n_rows)
        rows = rows.detach().cpu()
        if rows.dtype != torch.int64 or rows.shape != (count,):
            raise RejectedMessageError(f"{count} answers for rows of {rows.dtype} {list(rows.shape)}")
        if count and not (rows.min() >= 0 and rows.max() < self.n_rows):
            raise RejectedMessageError(f"a row lies outside of 0 … {self.n_rows - 1}")
        if len(rows.unique()) != count:
            raise RejectedMessageError("a row is answered twice")
        return rows

    def _checked_log_weights(self, responses: Responses) -> Tensor:
        """Log-weights of the predicted rows, float64 [m]."""
        confidence, count = responses.confidence, len(responses.values)
        if confidence is None:
            if self.weighted:
                raise RejectedMessageError("answers without confidence")
            return torch.zeros(count, dtype=torch.float64)
        if self.weighted is False:
            raise RejectedMessageError("answers with a confidence that was not asked for")
        log_weights = confidence.values().detach().to("cpu", torch.float64)
        if log_weights.shape != (count,):
            raise RejectedMessageError(f"{count} answers with {len(log_weights)} confidences")
        if not (log_weights.abs() <= LIMIT + _SLACK).all():  # NaN fails too
            raise RejectedMessageError(f"a confidence lies outside of ±{LIMIT:g}")
        return log_weights


class ParameterMean(Aggregate):
    """Mean over clients of their weights and buffers, weighted by sample counts: ``Σ n_k w_k / Σ n_k`` (FedAvg).

    Sums are float64: 8 bytes per parameter, whatever the number of clients, and the mean of equal models is that model
    to the bit. Integers and booleans, e.g. BatchNorm's count of batches, are not averaged: the largest value is kept.

    Args:
        like: tensors with the names, shapes and dtypes of every client's, e.g. the state of the server's model.

    Attributes:
        averaged: shapes of the floating-point tensors, by name.
    """

    def __init__(self, like: Mapping[str, Tensor]):
        self._like = {name: (tensor.shape, tensor.dtype) for name, tensor in like.items()}
        self._layout = [(name, tuple(shape), dtype) for name, (shape, dtype) in self._like.items()]
        self.samples = 0
        self.averaged = {name: shape for name, (shape, dtype) in self._like.items() if dtype.is_floating_point}
        # one flat vector for all sums: a model in one flat buffer is added, and divided, in one operation
        self._sum = torch.zeros(sum(shape.numel() for shape in self.averaged.values()), dtype=torch.float64)
        self._largest: dict[str, Tensor] = {}

    def add(self, parameters: Parameters, client: int) -> None:
        """Add one client's parameters.

        Args:
            parameters: with the number of samples that they were trained on, > 0.
            client: id of the sender.

        Raises:
            RejectedMessageError: the parameters do not fit; the mean is unchanged.
        """
        self.check(parameters)
        parameters.validate()
        tensors = parameters.tensors
        whole = (
            parameters.whole
            if list(tensors) == list(self.averaged)
            else flat_view([tensors[name] for name in self.averaged])
        )
        if whole is not None:
            self._sum.add_(whole.detach().cpu(), alpha=parameters.samples)
        else:
            for name, total in self.named(self._sum).items():
                total.add_(tensors[name].detach().cpu(), alpha=parameters.samples)
        if len(self.averaged) < len(self._like):
            for name in self._like.keys() - self.averaged.keys():
                self._keep_largest(name, tensors[name].detach().cpu())
        self.samples += parameters.samples

    def merge(self, other: ParameterMean) -> None:
        """Add another mean.

        Args:
            other: a mean of the same model over other clients, e.g. of another process.

        Raises:
            ValueError: it is of another model.
        """
        if self._like != other._like:
            raise ValueError("means of different models do not merge")
        self._sum.add_(other._sum)
        for name, tensor in other._largest.items():
            self._keep_largest(name, tensor)
        self.samples += other.samples

    def reduce(self, ranks: ProcessGroup) -> None:
        """Combine this mean with its counterparts on all other ranks; a collective call.

        Args:
            ranks: the processes.
        """
        ranks.sum(self._sum)
        samples = torch.tensor([self.samples])
        ranks.sum(samples)
        self.samples = int(samples)
        for name, (shape, dtype) in self._like.items():
            if name not in self.averaged:
                lowest = 0 if dtype is torch.bool else torch.iinfo(dtype).min
                largest = self._largest.get(name, torch.full(shape, lowest, dtype=dtype)).long()
                ranks.max_(largest)
                self._largest[name] = largest.to(dtype)

    def result(self) -> Mapping[str, Tensor] | None:
        """The mean by name, in the dtypes of `like`; None without uploads."""
        if self.samples == 0:
            return None
        mean = self._sum / self.samples
        if len(self.averaged) == len(self._like) and len({dtype for _, dtype in self._like.values()}) == 1:
            return FlatTensors(mean.to(self._layout[0][2]), {name: shape for name, shape, _ in self._layout})
        dtypes = {dtype for name, (_, dtype) in self._like.items() if name in self.averaged}
        means = self.named(mean.to(dtypes.pop()) if len(dtypes) == 1 else mean)
        return {
            name: means[name].to(dtype) if name in means else self._largest[name].clone()
            for name, (_, dtype) in self._like.items()
        }

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector of all averaged elements, by tensor.

        Args:
            vector: one element per averaged element, in the order of `averaged`.
        """
        parts = vector.split([shape.numel() for shape in self.averaged.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.averaged.items(), parts)}

    def check(self, parameters: Parameters) -> None:
        """Reject parameters of another model, or without samples.

        Args:
            parameters: upload of one client.

        Raises:
            RejectedMessageError: the parameters do not fit.
        """
        if not isinstance(parameters, Parameters):
            raise RejectedMessageError(f"expected parameters, got {parameters.kind}")
        tensors = parameters.tensors
        if parameters.samples < 1:
            raise RejectedMessageError(f"parameters that were trained on {parameters.samples} samples")
        if parameters.layout == self._layout:
            return
        missing, extra = sorted(self._like.keys() - tensors.keys()), sorted(tensors.keys() - self._like.keys())
        if missing or extra:
            raise RejectedMessageError(f"tensors missing: {missing[:3]}, unknown: {extra[:3]}")
        for name, (shape, dtype) in self._like.items():
            tensor = tensors[name]
            if tensor.shape != shape:
                raise RejectedMessageError(f"tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
            if tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex():
                raise RejectedMessageError(f"tensor {name!r} is {tensor.dtype}, expected {dtype}")

    def _keep_largest(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.to(self._like[name][1], copy=True)
        self._largest[name] = torch.maximum(self._largest[name], tensor) if name in self._largest else tensor


def _on_simplex(values: Tensor) -> Tensor:
    """Normalise rows to sum 1 after rounding in transmission, so that no client has more than one vote."""
    if values.numel() and not (values.min() >= -_SLACK and values.max() <= 1 + _SLACK):
        raise RejectedMessageError("a probability lies outside of 0 … 1")
    values = values.clamp(0, 1)
    total = values.sum(1, keepdim=True)
    if not (total > 0).all():
        raise RejectedMessageError("probabilities of a row are all 0")
    return values / total


def _settings(mean: ResponseMean) -> tuple:
    return mean.n_rows, mean.num_classes, mean.space, mean.weighted, mean.cap
