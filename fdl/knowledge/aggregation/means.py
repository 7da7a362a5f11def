"""Means of what clients send.

Both are sums in float64, so that the order in which clients come, or how they are spread over processes (`merge`),
moves the float32 result by its last bit at most. They stream, so that memory grows with the model or the proxy set and
never with the clients; but for answers whose weights clients declare and the server caps, which have to wait until all
weights of a row are known. A message that does not fit is refused before it changes anything.
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
"""How far rounding on the way may carry a probability or a log-weight out of its range."""


@dataclass(frozen=True, eq=False)
class AggregatedResponses:
    """What the clients of a round agree on, row by row of the proxy set.

    Attributes:
        values: float32 [n, C], probabilities or logits; uniform where nobody answered.
        form: which of the two.
        coverage: int64 [n], how many clients answered each row.
        log_weight: float32 [n], logarithm of the sum of their weights; -inf where nobody answered. With a density it
            tells how much a row looks like anyone's data.
        agreement: float32 [n] in [0, 1]: 1 - H(p)/log C of the mean p; 1 where all are sure of one class, 0 where the
            mean is uniform.
    """

    values: Tensor
    form: Space
    coverage: Tensor
    log_weight: Tensor
    agreement: Tensor

    @classmethod
    def of(cls, values: Tensor, form: Space, coverage: Tensor, log_weight: Tensor) -> AggregatedResponses:
        """Knowledge with the agreement that its values show; arguments as the attributes, of any real dtype."""
        p = values if form == "probabilities" else torch.softmax(values, dim=1)
        most = torch.tensor(float(values.shape[1])).log().clamp_min(torch.finfo(torch.float32).tiny)
        agreement = (1 - torch.special.entr(p).sum(1) / most).clamp(0, 1)
        return cls(values.float(), form, coverage, log_weight.float(), agreement.float())

    @property
    def probabilities(self) -> Tensor:
        """The values as probabilities, float32 [n, C]."""
        return self.values if self.form == "probabilities" else torch.softmax(self.values, dim=1)


class ResponseMean(Aggregate):
    """Mean over clients of their answers to the proxy set, each row weighted by softmax over clients of log-weights.

    A log-weight is what a client says of itself. With a cap, no client has more than so many equal shares of a round
    (`shares.Cap`), whatever it says. Whom that cuts is known once all have spoken: messages are kept
    as they came until then, for K clients K n (C + 1) numbers. Without a cap, or where all count alike, the mean
    streams: the softmax is taken online, a row keeps the largest log-weight seen so far, and the sums relative to it.

    Args:
        n_rows: size of the proxy set.
        num_classes: C.
        space: average probabilities (DS-FL), where one client can move a row by no more than √2 times its share, or
            logits (FedMD, FedDF), where an over-confident client counts for more.
        weighted: True refuses answers without confidence, False refuses those with. None takes both; an answer
            without confidence then has log-weight 0.
        cap: how much one client may have at most; None for any.
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
        self._waiting: list[tuple[int, Responses]] = []
        self._largest = torch.full((n_rows,), -torch.inf, dtype=torch.float64)
        self._weight = torch.zeros(n_rows, dtype=torch.float64)
        self._values = torch.zeros(n_rows, num_classes, dtype=torch.float64)
        self._coverage = torch.zeros(n_rows, dtype=torch.int64)

    def add(self, responses: Responses, client: int) -> None:
        """Take in one client's answers.

        Args:
            responses: logits or probabilities for some rows or all; turned into what `space` averages.
            client: who sent them.

        Raises:
            RefusedError: they do not fit; the mean is as it was.
        """
        rows, log_weights, values = self.checked(responses)
        if self.cap is None:
            self._accumulate(rows, log_weights, torch.ones_like(log_weights), values, torch.ones_like(rows))
        else:
            self._waiting.append((client, responses))
        self.clients += 1

    def checked(self, responses: Responses) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, int64 [n], log-weights, float64 [n], and answers in this mean's space, float64 [n, C], of a message.

        Raises:
            RefusedError: they do not fit.
        """
        if not isinstance(responses, Responses):
            raise RejectedMessageError(f"expected responses, got {responses.kind}")
        values, rows = self._checked_values(responses), self._checked_rows(responses)
        return rows, self._checked_log_weights(responses), values

    def merge(self, other: ResponseMean) -> None:
        """Take in another mean over other clients, e.g. of another process."""
        if _settings(self) != _settings(other):
            raise ValueError(f"means of {_settings(self)} and {_settings(other)} do not merge")
        self._waiting += other._waiting
        rows = torch.arange(self.n_rows)[other._coverage > 0]
        self._accumulate(rows, other._largest[rows], other._weight[rows], other._values[rows], other._coverage[rows])
        self.clients += other.clients

    def result(self) -> AggregatedResponses | None:
        """The mean, or None when nobody was added."""
        if self.clients == 0:
            return None
        if self._waiting:
            return self._settled().result()
        answered = self._coverage > 0
        values = self._values / self._weight.where(answered, 1.0).unsqueeze(1)
        if self.space == "probabilities":
            values = values.where(answered.unsqueeze(1), 1 / self.num_classes)
        return AggregatedResponses.of(values, self.space, self._coverage.clone(), self._largest + self._weight.log())

    def _settled(self) -> ResponseMean:
        """The mean, without a cap, of all that waited, with the log-weights that the cap leaves."""
        told = [message for _, message in sorted(self._waiting, key=lambda waiting: waiting[0])]
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
        """Add sums that are relative to exp(largest): rescale whichever side is the smaller."""
        together = torch.maximum(self._largest[rows], largest)
        before, new = (self._largest[rows] - together).exp(), (largest - together).exp()
        self._weight[rows] = self._weight[rows] * before + weight * new
        self._values[rows] = self._values[rows] * before.unsqueeze(1) + values * new.unsqueeze(1)
        self._largest[rows] = together
        self._coverage[rows] += coverage

    def _checked_values(self, responses: Responses) -> Tensor:
        """The answers in this mean's space, float64 [n, C]."""
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
        # the floor is what float32 can tell from 0: a class that was rounded away is unlikely, not impossible
        return values if self.space == "probabilities" else values.clamp_min(torch.finfo(torch.float32).eps).log()

    def _checked_rows(self, responses: Responses) -> Tensor:
        """Which rows they are for, int64 [n]."""
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
        """Log-weights of the rows, float64 [n]."""
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

    Sums are float64: 8 bytes a parameter, whatever the number of clients, and the mean of equal models is that model to
    the bit. Integers and booleans, e.g. BatchNorm's count of batches, are not averaged: the largest value is kept.

    Args:
        like: names, shapes and dtypes that every client's tensors must have, e.g. the state of the server's model.

    Attributes:
        averaged: shapes of the tensors of real numbers, by name.
    """

    reduces = True

    def __init__(self, like: Mapping[str, Tensor]):
        self._like = {name: (tensor.shape, tensor.dtype) for name, tensor in like.items()}
        self._layout = [(name, tuple(shape), dtype) for name, (shape, dtype) in self._like.items()]
        self.samples = 0
        self.averaged = {name: shape for name, (shape, dtype) in self._like.items() if dtype.is_floating_point}
        # one vector for all sums: a model that comes in one piece is added, and divided, in one piece
        self._sum = torch.zeros(sum(shape.numel() for shape in self.averaged.values()), dtype=torch.float64)
        self._largest: dict[str, Tensor] = {}

    def add(self, parameters: Parameters, client: int) -> None:
        """Take in one client's parameters.

        Args:
            parameters: with the number of samples that they were trained on, > 0.
            client: who sent them.

        Raises:
            RefusedError: they do not fit; the mean is as it was.
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
        """Take in another mean over other clients, e.g. of another process."""
        if self._like != other._like:
            raise ValueError("means of different models do not merge")
        self._sum.add_(other._sum)
        for name, tensor in other._largest.items():
            self._keep_largest(name, tensor)
        self.samples += other.samples

    def reduce(self, ranks: ProcessGroup) -> None:
        """Take in what the same mean took in on all other ranks, and let them do so."""
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
        """The mean by name, in the dtypes of `like`; None when nobody was added."""
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
        """Views of a vector of all averaged elements, by tensor."""
        parts = vector.split([shape.numel() for shape in self.averaged.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.averaged.items(), parts)}

    def check(self, parameters: Parameters) -> None:
        """Refuse parameters of another model, or without samples."""
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
    """Make rows sum to 1 again after rounding on the way, so that no client has more than one vote."""
    if values.numel() and not (values.min() >= -_SLACK and values.max() <= 1 + _SLACK):
        raise RejectedMessageError("a probability lies outside of 0 … 1")
    values = values.clamp(0, 1)
    total = values.sum(1, keepdim=True)
    if not (total > 0).all():
        raise RejectedMessageError("probabilities of a row are all 0")
    return values / total


def _settings(mean: ResponseMean) -> tuple:
    return mean.n_rows, mean.num_classes, mean.space, mean.weighted, mean.cap
