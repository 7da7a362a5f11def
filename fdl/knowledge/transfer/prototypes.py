"""Prototypes: a few centroids for each class or concept of a client's data, with counts and confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.shares import CAP, Cap
from fdl.knowledge.confidence.base import LIMIT, ClientView, public_space
from fdl.knowledge.transfer.extraction import EMBEDDING, Extracted, Moments
from fdl.knowledge.transfer.features import WIDEST, sketch
from fdl.losses.prototypes import PROTOTYPE_LOSSES
from fdl.messages import Prototypes, QuantizedLogWeights
from fdl.participants import Client, Server
from fdl.utils.arguments import at_least, not_negative, one_of, positive
from fdl.utils.threads import single


class PrototypeTransfer:
    """A few centroids for each class of every client's data teach the student where classes lie.

    In the public space (the recipe's encoder, else PCA fitted on the proxy set) centroids of all clients compare, and
    the server merges them. A specialist's own embedding space compares with nobody's; there an adapter must bring
    them together. A proxy sample belongs to the prototypes of a class to the extent that the clients' answers say so.

    Centroids are means of private samples in a feature space: with few samples each, they say much about these, and the
    mean of one is that sample. Those of fewer than `floor` samples are not sent.

    Args:
        count: k, centroids a class (or of all data, by concept), at most one for each distinct sample.
        space: where they lie.
        by: one group a class; or, by concept, a single group of all data, for which no labels are needed.
        loss: ``"infonce"`` contrasts prototypes, ``"mse"`` draws the student to those of its class.
        weight: γ, the weight in the server's loss; 0 switches prototypes off.
        temperature: of the contrast, > 0.
        floor: fewest samples that a centroid which is sent stands for.
    """

    name = "prototype_transfer"

    def __init__(
        self,
        count: int = 2,
        space: Literal["public", "embedding"] = "public",
        by: Literal["class", "concept"] = "class",
        loss: Literal["infonce", "mse"] = "infonce",
        weight: float = 0.1,
        temperature: float = 0.1,
        floor: int = 4,
    ):
        self.count, self.space = at_least("count", count, 1), one_of("space", space, ("public", "embedding"))
        self.by, self.loss = one_of("by", by, ("class", "concept")), one_of("loss", loss, PROTOTYPE_LOSSES)
        self.weight, self.temperature = not_negative("weight", weight), positive("temperature", temperature)
        self.floor = at_least("floor", floor, 1)
        settings = {"temperature": self.temperature} if loss == "infonce" else {}
        self.function: Callable[..., Tensor] = lambda *sides: PROTOTYPE_LOSSES[loss](*sides, **settings)

    @property
    def needs_encoder(self) -> bool:
        """True if prototypes lie in the space of the recipe's public encoder."""
        return self.space == "public"

    def message(self, client: Client, private: Callable[[], Extracted], proxy: Extracted) -> Prototypes:
        """Build a client's message.

        Args:
            client: the client whose data the prototypes summarise.
            private: returns its specialist's outputs for its private samples.
            proxy: its specialist's outputs for the proxy set, over which embeddings are standardised.
        """
        if len(client.train) == 0:
            width = proxy.embedding.shape[1] if self.space == EMBEDDING else _public(client).shape[1]
            none = torch.zeros(0, dtype=torch.int64)
            return Prototypes(torch.zeros(0, width), none, none, QuantizedLogWeights.quantize(torch.zeros(0)))
        own, labels = private(), client.train.labels
        if self.space == EMBEDDING:
            points = Moments.of(proxy.embedding).standardize(own.embedding)
        else:
            points = torch.from_numpy(_private(client))
        groups = labels if self.by == "class" else torch.full_like(labels, -1)
        values, kept, members = centroids(points.numpy(), groups.numpy(), self.count)
        # how sure the specialist is of the samples that a prototype stands for
        sure = torch.log_softmax(own.logits, 1).gather(1, labels.unsqueeze(1)).squeeze(1).clamp_min(-LIMIT)
        counts = torch.bincount(members, minlength=len(values))
        mean = torch.zeros(len(values)).index_add_(0, members, sure.float()) / counts
        many = counts >= self.floor
        return Prototypes(values[many], kept[many], counts[many], QuantizedLogWeights.quantize(mean[many]))


@dataclass(frozen=True, eq=False)
class PrototypeKnowledge:
    """The prototypes of all clients of a round.

    Attributes:
        values: float32 [m, d], in the public space; or sketches of embeddings, in the adapter's input space.
        labels: int64 [m]; -1 for concepts.
        weights: float32 [m], counts times confidence.
        participants: int64 [m], whose they are; None where they were merged.
    """

    values: Tensor
    labels: Tensor
    weights: Tensor
    participants: Tensor | None = None

    def assignment(self, probabilities: Tensor, public: Tensor | None) -> Tensor:
        """Compute the share to which each proxy row belongs to each prototype.

        Args:
            probabilities: float [n, C], what the clients answer together.
            public: float [n, d], the rows in the space of `values`; then of each class the nearest prototype gets the
                whole share, else all of a class share by their weights.

        Returns:
            float32 [n, m]; rows sum to 1.
        """
        same = self.labels.unsqueeze(0) == self.labels.unsqueeze(1)
        if public is None:
            within = (self.weights / (same * self.weights).sum(1)).expand(len(probabilities), -1)
        else:
            distances = torch.cdist(public, self.values)
            within = torch.zeros_like(distances)
            for label in self.labels.unique():
                group = torch.nonzero(self.labels == label).squeeze(1)
                within.scatter_(1, group[distances[:, group].argmin(1)].unsqueeze(1), 1.0)
        classes = probabilities[:, self.labels] if int(self.labels[0]) >= 0 else torch.ones_like(within)
        shares = classes * within
        # a row of classes without any prototype belongs to all of them alike
        total = shares.sum(1, keepdim=True)
        return torch.where(total > 1e-6, shares / total.clamp_min(1e-6), 1 / len(self.values)).float()


class PrototypePool:
    """Prototypes of one round; few enough to be kept: clients · classes · k vectors.

    Args:
        server: gives the number of classes and the public space.
        transfer: the settings.
        width: of the adapter's input space, into which embeddings are brought.
        cap: how much weight one client's prototypes may have at most among classes, whatever counts and confidences it
            declares; None for any.
    """

    def __init__(self, server: Server, transfer: PrototypeTransfer, width: int, cap: Cap | None = CAP):
        self.cap = cap
        self.transfer, self.width, self.seed, self.num_classes = transfer, width, server.seed, server.num_classes
        self._public = _public(server).shape[1] if transfer.space == "public" else None
        self._by_client: dict[int, Prototypes] = {}

    def check(self, prototypes: Prototypes) -> None:
        """Refuse another space, and classes that there are not.

        Raises:
            RefusedError: naming what is wrong.
        """
        if self._public not in (None, prototypes.values.shape[1]):
            raise RejectedMessageError(f"expected prototypes [m, {self._public}], got {list(prototypes.values.shape)}")
        if prototypes.values.shape[1] > WIDEST:
            raise RejectedMessageError(f"prototypes of {prototypes.values.shape[1]} features, the most is {WIDEST}")
        labels, most = prototypes.labels, self.transfer.count
        low, high = (0, self.num_classes - 1) if self.transfer.by == "class" else (-1, -1)
        if len(labels) and not (labels.min() >= low and labels.max() <= high):
            raise RejectedMessageError(f"a prototype's class lies outside of {low} … {high}")
        if len(labels) and int((labels - low).bincount().max()) > most:
            raise RejectedMessageError(f"more than {most} prototypes of one class")

    def add(self, prototypes: Prototypes, client: int) -> None:
        """Add one client's prototypes, which `check` has accepted.

        Args:
            prototypes: its prototypes.
            client: id of the sender.
        """
        self._by_client[client] = prototypes

    def result(self) -> PrototypeKnowledge | None:
        """The prototypes of all clients; None without any."""
        values, labels, weights, owners = [], [], [], []
        for client in sorted(self._by_client):  # in the order of ids, not of turns
            prototypes = self._by_client[client]
            if len(prototypes.values) == 0:
                continue
            own = prototypes.values
            if self._public is None:
                own = sketch({EMBEDDING: own}, client, self.width, self.seed)
            sure = 1.0 if prototypes.confidence is None else prototypes.confidence.values().clamp(-LIMIT, LIMIT).exp()
            values.append(own.float())
            labels.append(prototypes.labels)
            weights.append(prototypes.counts * sure)
            owners.append(torch.full_like(prototypes.labels, client))
        if not values:
            return None
        values, labels, weights, owners = (torch.cat(part) for part in (values, labels, weights, owners))
        pooled = values, labels, self._limited(labels, weights, owners), owners
        return PrototypeKnowledge(*pooled) if self._public is None else self._merged(*pooled)

    def _limited(self, labels: Tensor, weights: Tensor, owners: Tensor) -> Tensor:
        """The weights, where those of one client's prototypes of a class are too large together, all smaller alike."""
        if self.cap is None:
            return weights
        classes, column = labels.unique(return_inverse=True)
        clients, row = owners.unique(return_inverse=True)
        place = (row, column)
        total = torch.zeros(len(clients), len(classes), dtype=torch.float64)
        total.index_put_(place, weights.double(), accumulate=True)
        logs = total.log()
        return (weights * (self.cap.limit(logs) - logs)[place].exp()).float()

    def _merged(self, values: Tensor, labels: Tensor, weights: Tensor, owners: Tensor) -> PrototypeKnowledge:
        """At most k prototypes a class: means of all clients' by weighted k-means."""
        merged, kept, members = centroids(values.numpy(), labels.numpy(), self.transfer.count, weights.numpy())
        total = torch.zeros(len(merged)).index_add_(0, members, weights.float())
        return PrototypeKnowledge(merged, kept, total)


def centroids(
    points: np.ndarray, groups: np.ndarray, count: int, weights: np.ndarray | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """k-means within each group; the same points give the same centroids wherever and whenever.

    Args:
        points: [n, d].
        groups: int [n].
        count: k, centroids a group; fewer where a group has fewer distinct points.
        weights: [n], how much each point counts, > 0; None for all alike.

    Returns:
        Centroids float32 [m, d], their groups int64 [m], and to which of them each point belongs, int64 [n].
    """
    from sklearn.cluster import KMeans

    weights = np.ones(len(points)) if weights is None else weights.astype(np.float64)
    values, kept, members = [], [], np.zeros(len(points), dtype=np.int64)
    with single():
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            k = min(count, len(np.unique(points[rows], axis=0)))
            belongs = np.zeros(len(rows), dtype=np.int64)
            if k > 1:
                means = KMeans(k, n_init=2, random_state=0).fit(points[rows], sample_weight=weights[rows])
                belongs = np.unique(means.labels_, return_inverse=True)[1]
            members[rows] = belongs + len(values)
            for cluster in range(int(belongs.max()) + 1):
                chosen = rows[belongs == cluster]
                values.append(np.average(points[chosen], axis=0, weights=weights[chosen]))
                kept.append(group)
    stacked = torch.from_numpy(np.stack(values).astype(np.float32))
    return stacked, torch.tensor(np.array(kept), dtype=torch.int64), torch.from_numpy(members)


def _public(holder: ClientView) -> np.ndarray:
    """The proxy set in the public space."""
    return public_space(holder).encode_public(holder.proxy)


def _private(client: ClientView) -> np.ndarray:
    """A client's data in the public space, encoded once; they stay with it."""
    if "prototypes/points" not in client.cache:
        client.cache["prototypes/points"] = public_space(client).encode(client.train)
    return client.cache["prototypes/points"]
