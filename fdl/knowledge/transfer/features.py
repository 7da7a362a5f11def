"""Feature transfer: activations of specialists of any width and depth, as one target for the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.shares import CAP, Cap
from fdl.knowledge.confidence.base import LIMIT
from fdl.knowledge.transfer.extraction import Extracted, Moments, layer_names
from fdl.knowledge.transfer.layer_selection import LayerSelection
from fdl.losses.features import FEATURE_LOSSES
from fdl.messages import Features
from fdl.participants import Client
from fdl.utils.arguments import at_least, not_negative, one_of
from fdl.utils.seeding import torch_stream

WIDEST = 1 << 16
"""Most features that one client may send for a sample: the server makes a random row for each."""

_SLACK = 1e-3
"""Tolerance for a log-weight outside of its range after rounding in transmission."""


class FeatureTransfer:
    """Activations of chosen layers, for every proxy sample, teach the student's own.

    Clients pool each layer to one vector a sample and standardise it over the proxy set. Widths and depths differ from
    client to client, so the server multiplies each layer by a random matrix of the client's own, [d, width] (the
    inner products of the sum over clients then are, in expectation, the sum of the clients' inner products), and
    averages with the same weights as the answers. Memory grows with the proxy set and `width`, not with clients; with
    an adapter it does, since the clients' features then are kept apart.

    Args:
        layers: the last so many blocks of each specialist, or names and globs of its layers; ``"embedding"`` is what
            its last layer sees.
        student: likewise, the student's layers that are compared.
        loss: a name among `fdl.losses.features.FEATURE_LOSSES`; those that compare point by point see the student
            through a linear projector, the relational ones do not need any.
        weight: β, the weight in the server's loss; 0 switches features off.
        width: of the common space.
        components: send only so many principal components of each layer, found by each client in its first round and
            kept; None sends all that a layer has.
        select: of `layers`, each client sends only those that it finds to be worth their bytes; None sends all.
    """

    name = "feature_transfer"

    def __init__(
        self,
        layers: int | list[str] = 1,
        student: int | list[str] = 0,
        loss: Literal["mse", "smooth_l1", "normalized_mse", "cosine", "distance", "angle", "relational", "cka"] = "cka",
        weight: float = 1.0,
        width: int = 64,
        components: int | None = None,
        select: LayerSelection | None = None,
    ):
        for name, value in (("layers", layers), ("student", student)):
            at_least(name, value if isinstance(value, int) else len(value), 0 if isinstance(value, int) else 1)
        self.layers, self.student = layers, student
        self.loss = one_of("loss", loss, FEATURE_LOSSES)
        self.weight, self.width = not_negative("weight", weight), at_least("width", width, 1)
        self.components = None if components is None else at_least("components", components, 1)
        self.select = select

    def message(self, client: Client, extracted: Extracted, rows: Tensor | None) -> Features:
        """Build a client's message.

        Args:
            client: the client; its state keeps the components, so that they are the same from round to round.
            extracted: its specialist's layers on the whole proxy set, over which they are standardised.
            rows: rows of the proxy set that are uploaded, int64 [m]; None for all.
        """
        layers = extracted.layers
        if self.select is not None:
            most = max(values.shape[1] for values in layers.values()) if self.components is None else self.components
            widths = {name: min(values.shape[1], most) for name, values in layers.items()}
            layers = {name: layers[name] for name in self.select.choose(client, extracted, widths)}
        layers = {name: Moments.of(values).standardize(values) for name, values in layers.items()}
        if self.components is not None:
            bases = {name: principal(values, self.components) for name, values in layers.items()}
            bases |= client.state.get("components", {})
            client.state["components"] = bases
            layers = {name: values @ bases[name] for name, values in layers.items()}
        if rows is not None:
            layers = {name: values[rows] for name, values in layers.items()}
        return Features(layers, rows)

    def names(self, client: Client) -> list[str]:
        """The layers of a client's specialist."""
        return layer_names(client.runtime.shared_module(client.architecture), self.layers)


@dataclass(frozen=True, eq=False)
class FeatureKnowledge:
    """Aggregated features of a round's clients.

    Attributes:
        values: float32 [n, width], the weighted sum over clients; or [n, P, width] of each of P clients.
        known: bool [n], rows that at least one client uploaded.
        shares: float32 [n, P], each client's weight per row; rows sum to 1, or to 0 without upload. None for a sum.
        participants: int64 [P], ids of the clients; None for a sum.
    """

    values: Tensor
    known: Tensor
    shares: Tensor | None = None
    participants: Tensor | None = None


class FeatureMean:
    """Features of one round in one space, weighted row by row like the answers.

    The sum is ``Σ_i √w_i(x) f_i(x) S_i`` with the client's shares w and sketches S, so that inner products of rows,
    and with them distances and angles, are weighted by the geometric mean of the shares of both rows.

    Args:
        n_rows: size of the proxy set.
        width: of the common space.
        seed: the recipe's.
        apart: keep clients apart, for an adapter.
        cap: how much one client may have at most; None for any. Both keep n_rows · width numbers
            of each client until the end of the round.
    """

    def __init__(self, n_rows: int, width: int, seed: int, apart: bool = False, cap: Cap | None = CAP):
        self.n_rows, self.width, self.seed, self.apart, self.cap = n_rows, width, seed, apart, cap
        self._largest = torch.full((n_rows,), -torch.inf, dtype=torch.float64)
        self._weight = torch.zeros(n_rows, dtype=torch.float64)
        self._values = torch.zeros(n_rows, width, dtype=torch.float64)
        self._clients: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def check(self, features: Features) -> None:
        """Refuse rows outside of the proxy set, too few of them, or too wide ones, and confidences beyond bounds.

        Raises:
            RefusedError: naming what is wrong.
        """
        count, width = len(next(iter(features.layers.values()))), sum(v.shape[1] for v in features.layers.values())
        if width > WIDEST:
            raise RejectedMessageError(f"{width} features of a sample, the most is {WIDEST}")
        if features.rows is None and count != self.n_rows:
            raise RejectedMessageError(f"expected features of all {self.n_rows} proxy rows, got {count}")
        if features.rows is not None:
            if count and not int(features.rows.max()) < self.n_rows:
                raise RejectedMessageError(f"a row of features lies outside of 0 … {self.n_rows - 1}")
            if len(features.rows.unique()) != count:
                raise RejectedMessageError("features of a row were sent twice")
        own = features.confidence
        if own is not None and not (own.values().abs() <= LIMIT + _SLACK).all():  # NaN fails too
            raise RejectedMessageError(f"a confidence of features lies outside of ±{LIMIT:g}")

    def add(self, features: Features, log_weights: Tensor, client: int) -> None:
        """Add one client's features, which `check` has accepted.

        Args:
            features: features of some rows or all.
            log_weights: float64 [n_rows], used if the message has no confidence of its own.
            client: id of the sender.
        """
        rows = torch.arange(self.n_rows) if features.rows is None else features.rows
        own = features.confidence
        weights = log_weights[rows] if own is None else own.values().double()
        seen = sketch(features.layers, client, self.width, self.seed)
        if self.apart or self.cap is not None:
            self._clients[client] = rows, seen, weights
        else:
            self._add(rows, seen, weights)

    def _add(self, rows: Tensor, seen: Tensor, weights: Tensor) -> None:
        """Add one client's sketched features to the sums."""
        # a running softmax over clients: sums are relative to the largest log-weight seen so far
        together = torch.maximum(self._largest[rows], weights)
        before, new = (self._largest[rows] - together).exp(), (weights - together).exp()
        self._weight[rows] = self._weight[rows] * before + new
        self._values[rows] = self._values[rows] * before.sqrt().unsqueeze(1) + seen * new.sqrt().unsqueeze(1)
        self._largest[rows] = together

    def result(self) -> FeatureKnowledge | None:
        """The features of all clients; None when there were none."""
        # in the order of ids, not of turns
        participants = sorted(self._clients)
        logs = torch.full((len(participants), self.n_rows), -torch.inf, dtype=torch.float64)
        for own, client in zip(logs, participants):
            own[self._clients[client][0]] = self._clients[client][2]
        logs = logs if self.cap is None else self.cap.limit(logs)
        if not self.apart:
            if participants:
                mean = FeatureMean(self.n_rows, self.width, self.seed, cap=None)
                for own, client in zip(logs, participants):
                    rows, seen, _ = self._clients[client]
                    mean._add(rows, seen, own[rows])
                return mean.result()
            answered = self._weight > 0
            if not answered.any():
                return None
            values = self._values / self._weight.where(answered, 1.0).sqrt().unsqueeze(1)
            return FeatureKnowledge(values.float(), answered)
        if not participants:
            return None
        values = torch.zeros(self.n_rows, len(participants), self.width)
        for column, client in enumerate(participants):
            rows, seen, _ = self._clients[client]
            values[rows, column] = seen.float()
        logs = logs.T.contiguous()
        shares = torch.softmax(logs, dim=1).nan_to_num(0.0).float()
        return FeatureKnowledge(values, (logs > -torch.inf).any(1), shares, torch.tensor(participants))


def principal(values: Tensor, count: int) -> Tensor:
    """Principal components of rows.

    Args:
        values: [n, d], of mean 0.
        count: number of components, at most d.

    Returns:
        float32 [d, count], orthonormal columns, the largest variance first; the largest entry of each is positive.
    """
    wide = values.double()
    directions = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (directions * largest.sign()).float()


def sketch(layers: Mapping[str, Tensor], client: int, width: int, seed: int) -> Tensor:
    """All layers of a client in one space of any width, through a random matrix for each layer and client.

    Args:
        layers: by name, [n, d], standardised.
        client: whose.
        width: of the space.
        seed: the recipe's.

    Returns:
        float64 [n, width], of variance 1 or so.
    """
    total = 0
    for name, values in layers.items():
        stream = torch_stream(seed, f"sketch/{name}", 0, client)
        matrix = torch.randn(values.shape[1], width, generator=stream, dtype=torch.float64)
        total = total + values.double() @ matrix
    return total / sum(values.shape[1] for values in layers.values()) ** 0.5
