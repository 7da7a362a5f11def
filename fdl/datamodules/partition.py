"""Partitioners: assignments of a pool of labelled samples to clients.

Every partitioner returns a disjoint cover: no sample twice, none lost. All randomness comes from the generator passed
in, so the same stream gives the same split. Numpy only, so that a recipe is checked without importing torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from fdl.datamodules.group_names import group_names, log_groups
from fdl.datamodules.shares import divide_groups, merge_groups, split_by_shares, split_evenly
from fdl.errors import UserError


class Partitioner(ABC):
    """Base of partitioners of samples to clients; a subclass implements `assign`.

    Attributes:
        needs_labels: whether the partition depends on the samples' classes.
    """

    name: str
    needs_labels: bool = False

    def split(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Assign every sample to exactly one client.

        Args:
            labels: class of each sample, int [n].
            clients: number of clients.
            rng: random stream of the partition.
            groups: natural client or domain of each sample, [n] of any type; None where the data have none.

        Returns:
            One sorted array of int64 indices per client; disjoint, none empty, their union 0 … n-1.

        Raises:
            UserError: when there are more clients than samples, or the settings leave a client without any.
        """
        labels = np.asarray(labels)
        if clients < 1:
            raise UserError(f"clients must be at least 1, got {clients}")
        if clients > len(labels):
            raise UserError(f"{clients} clients cannot share {len(labels)} samples: each needs at least one")
        parts = [np.sort(part).astype(np.int64) for part in self.assign(labels, clients, rng, groups)]
        empty = [i for i, part in enumerate(parts) if len(part) == 0]
        if empty:
            raise UserError(
                f"{self.name} leaves {len(empty)} of {clients} clients without a sample (first: client {empty[0]}); "
                "use fewer clients"
            )
        return parts

    def names(self, parts: Sequence[np.ndarray], groups: np.ndarray | None = None) -> list[str]:
        """Return the display name of each client; by default empty: clients have only numbers.

        Args:
            parts: indices of each client's samples, as returned by `split`.
            groups: natural client or domain of each sample, [n] of any type; None where the data have none.
        """
        return [""] * len(parts)

    @abstractmethod
    def assign(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> list[np.ndarray]:
        """Return the indices of each client's samples, in any order; called by `split` with checked arguments.

        Args:
            labels: class of each sample, int [n].
            clients: number of clients, at most n.
            rng: random stream of the partition.
            groups: natural client or domain of each sample, [n] of any type; None where the data have none.
        """


class IID(Partitioner):
    """Equal shares drawn at random, the same distribution everywhere.

    Example:
        >>> import numpy as np
        >>> labels, rng = np.array([0, 0, 0, 1, 1, 1]), np.random.default_rng(0)
        >>> [len(part) for part in IID().split(labels, clients=4, rng=rng)]
        [2, 2, 1, 1]
    """

    name = "iid"

    def assign(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> list[np.ndarray]:
        """Cut one permutation into shares whose sizes differ by at most one."""
        return np.array_split(rng.permutation(len(labels)), clients)


class Dirichlet(Partitioner):
    """Label skew: class shares drawn from a Dirichlet distribution, stronger for a smaller alpha.

    With ``by="class"`` each class is shared out over clients by p ~ Dir(α·1_K) (Yurochkin et al. 2019; Lin et al.
    2020, FedDF): sizes vary too, so a draw that leaves some client too few samples is repeated. With ``by="client"``
    each client draws its own mixture of classes p ~ Dir(α·1_C) and all have equal sizes (Hsu et al. 2019); the last
    clients take what is left of the classes, so they are less skewed. The same alpha means different things in both.

    Args:
        alpha: concentration, > 0; 100 is nearly uniform, 0.1 strong skew.
        by: scheme, ``"class"`` or ``"client"``.
        min_samples: minimum number of samples per client for ``by="class"``; default 10, or a tenth of an equal share
            where that is less, and at least 1.
        balance: for ``by="class"``: give nothing more to a client that already holds an equal share (FedDF).
        max_tries: maximum number of draws.

    Raises:
        UserError: for values out of range; from `split` when no draw gave every client `min_samples`.
    """

    name = "dirichlet"
    needs_labels = True

    def __init__(
        self,
        alpha: float,
        by: Literal["class", "client"] = "class",
        min_samples: int | None = None,
        balance: bool = False,
        max_tries: int = 10_000,
    ):
        _require_positive("alpha", alpha)
        schemes = {"class": self._by_class, "client": self._by_client}
        if by not in schemes:
            raise UserError(f"by must be 'class' or 'client', got {by!r}")
        if min_samples is not None:
            _require_at_least_one("min_samples", min_samples)
        _require_at_least_one("max_tries", max_tries)
        if by == "client" and (balance or min_samples is not None):
            raise UserError("balance and min_samples are for by: class; by: client gives everybody an equal share")
        self.alpha, self.balance, self.max_tries = alpha, balance, max_tries
        self.min_samples, self._draw = min_samples, schemes[by]

    def assign(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> list[np.ndarray]:
        """Draw the number of samples per class and client, then the samples."""
        classes, sizes = np.unique(labels, return_counts=True)
        counts = self._draw(sizes, clients, rng)
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label, row in zip(classes, counts):
            members = rng.permutation(np.flatnonzero(labels == label))
            for part, own in zip(parts, np.split(members, np.cumsum(row)[:-1])):
                part.append(own)
        return [np.concatenate(part) for part in parts]

    def _by_class(self, sizes: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
        """Draw counts [C, K] whose rows follow Dir(α·1_K)."""
        total = int(sizes.sum())
        least = self.min_samples if self.min_samples is not None else max(1, min(10, total // (10 * clients)))
        if least * clients > total:
            raise UserError(f"{clients} clients with min_samples {least} need {least * clients} samples, got {total}")
        best = 0
        for _ in range(self.max_tries):
            shares = rng.dirichlet(np.full(clients, self.alpha), len(sizes))
            counts = self._balanced(shares, sizes, rng) if self.balance else split_by_shares(shares, sizes[:, None])
            smallest = int(counts.sum(0).min())
            if smallest >= least:
                return counts
            best = max(best, smallest)
        raise UserError(
            f"no draw of {self.max_tries} gave each of {clients} clients {least} of the {total} samples with alpha "
            f"{self.alpha:g} (the best left one with {best}); use a larger alpha, fewer clients, a smaller min_samples"
            + ("" if self.balance else ", or balance: true")
        )

    @staticmethod
    def _balanced(shares: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw counts [C, K], class by class in random order; clients with an equal share get no more."""
        counts = np.zeros(shares.shape, dtype=np.int64)
        equal = sizes.sum() / shares.shape[1]
        for c in rng.permutation(len(sizes)):
            wanting = counts.sum(0) < equal
            share = shares[c] * wanting
            # a very small alpha may have put all of the class on clients that are full
            share = share / share.sum() if share.sum() > 0 else wanting / wanting.sum()
            counts[c] = split_by_shares(share[None], sizes[c])
        return counts

    def _by_client(self, sizes: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
        """Draw counts [C, K] whose columns follow each client's own mixture until classes are exhausted."""
        left = sizes.copy()
        counts = np.zeros((len(sizes), clients), dtype=np.int64)
        for client, wanted in enumerate(split_evenly(int(sizes.sum()), clients)):
            mixture = rng.dirichlet(np.full(len(sizes), self.alpha))
            while wanted > 0:
                # what an exhausted class cannot give is taken from the others, in the same proportions
                open_mixture = mixture * (left > 0)
                if not open_mixture.sum() > 0:
                    open_mixture = left.astype(float)
                drawn = np.minimum(split_by_shares((open_mixture / open_mixture.sum())[None], wanted)[0], left)
                counts[:, client] += drawn
                left -= drawn
                wanted -= int(drawn.sum())
        return counts


class ClassSplit(Partitioner):
    """Label skew: each client holds a fixed number of classes.

    Classes are assigned so that the numbers of their owners differ by at most one; owners share a class equally
    (#C = k in Li et al. 2022, NIID-Bench).

    Args:
        classes_per_client: number of classes per client, ≥ 1.

    Raises:
        UserError: for values out of range; from `split` when clients cannot cover all classes.
    """

    name = "class_split"
    needs_labels = True

    def __init__(self, classes_per_client: int = 2):
        _require_at_least_one("classes_per_client", classes_per_client)
        self.classes_per_client = classes_per_client

    def assign(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> list[np.ndarray]:
        """Choose owners for each class, least owned classes first, and share its samples among them."""
        classes, sizes = np.unique(labels, return_counts=True)
        each = self.classes_per_client
        if each > len(classes):
            raise UserError(f"classes_per_client is {each}, but the data have {len(classes)} classes")
        if each * clients < len(classes):
            raise UserError(
                f"{clients} clients with classes_per_client {each} hold {each * clients} of {len(classes)} classes; "
                "the samples of the others would be lost"
            )
        owners: list[list[int]] = [[] for _ in classes]
        for client in range(clients):
            order = np.lexsort((rng.random(len(classes)), [len(o) for o in owners]))
            for c in order[:each]:
                owners[c].append(client)
        scarce = [(label, size, len(o)) for label, size, o in zip(classes, sizes, owners) if size < len(o)]
        if scarce:
            label, size, count = scarce[0]
            raise UserError(
                f"class {label} has {size} samples for {count} clients; use fewer clients or a smaller "
                "classes_per_client"
            )
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label, own in zip(classes, owners):
            members = rng.permutation(np.flatnonzero(labels == label))
            for client, share in zip(own, np.array_split(members, len(own))):
                parts[client].append(share)
        return [np.concatenate(part) for part in parts]


class Shards(Partitioner):
    """Label skew: samples sorted by class are cut into shards, and each client gets a few at random.

    The split of McMahan et al. 2017 for two shards per client.

    Args:
        shards_per_client: number of shards per client, ≥ 1.

    Raises:
        UserError: for values out of range; from `split` when there are more shards than samples.
    """

    name = "shards"
    needs_labels = True

    def __init__(self, shards_per_client: int = 2):
        _require_at_least_one("shards_per_client", shards_per_client)
        self.shards_per_client = shards_per_client

    def assign(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> list[np.ndarray]:
        """Sort by class, with samples of one class in random order, cut into shards, and assign these at random."""
        count = clients * self.shards_per_client
        if count > len(labels):
            raise UserError(
                f"{clients} clients with shards_per_client {self.shards_per_client} need {count} samples, "
                f"got {len(labels)}"
            )
        shuffled = rng.permutation(len(labels))
        shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], count)
        hands = rng.permutation(count).reshape(clients, self.shards_per_client)
        return [np.concatenate([shards[i] for i in hand]) for hand in hands]


class QuantitySkew(Partitioner):
    """Size skew: the same distribution everywhere, but some clients hold much more than others.

    Every client first gets `min_samples`; the rest is shared by p ~ Dir(α·1_K), or by a power law p_i ∝ i^(-exponent)
    over clients in random order.

    Args:
        alpha: concentration of the Dirichlet distribution, > 0.
        exponent: of the power law, > 0; exactly one of the two is given.
        min_samples: minimum number of samples per client, ≥ 1.

    Raises:
        UserError: for values out of range; from `split` when there are too few samples for `min_samples`.
    """

    name = "quantity_skew"

    def __init__(self, alpha: float | None = None, exponent: float | None = None, min_samples: int = 1):
        if (alpha is None) == (exponent is None):
            raise UserError(f"exactly one of alpha and exponent is needed, got alpha {alpha} and exponent {exponent}")
        for key, value in (("alpha", alpha), ("exponent", exponent)):
            if value is not None:
                _require_positive(key, value)
        _require_at_least_one("min_samples", min_samples)
        self.alpha, self.exponent, self.min_samples = alpha, exponent, min_samples

    def assign(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> list[np.ndarray]:
        """Draw the sizes, then cut one permutation."""
        spare = len(labels) - clients * self.min_samples
        if spare < 0:
            raise UserError(
                f"{clients} clients with min_samples {self.min_samples} need {clients * self.min_samples} samples, "
                f"got {len(labels)}"
            )
        if self.alpha is not None:
            shares = rng.dirichlet(np.full(clients, self.alpha))
        else:
            weights = np.arange(1, clients + 1, dtype=float) ** -self.exponent
            shares = rng.permutation(weights / weights.sum())
        sizes = self.min_samples + split_by_shares(shares[None], spare)[0]
        return np.split(rng.permutation(len(labels)), np.cumsum(sizes)[:-1])


class ByGroup(Partitioner):
    """Natural clients: samples stay with the site, writer or domain that they came from.

    With more groups than clients, whole groups are merged so that sizes are as equal as possible; with fewer, the
    largest groups are divided among several clients. In both cases a warning lists the groups of each client.

    Raises:
        UserError: from `split` when the data name no groups.

    Example:
        >>> import numpy as np
        >>> labels, groups = np.zeros(4, int), np.array(["a", "b", "a", "b"])
        >>> ByGroup().split(labels, clients=2, rng=np.random.default_rng(0), groups=groups)
        [array([0, 2]), array([1, 3])]
    """

    name = "by_group"

    def assign(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None
    ) -> list[np.ndarray]:
        """Merge or divide groups until there are as many as clients."""
        if groups is None:
            raise UserError("by_group needs data with a natural client or domain column, and these data have none")
        _, codes = np.unique(groups, return_inverse=True)
        members = [rng.permutation(np.flatnonzero(codes == g)) for g in range(codes.max() + 1)]
        if len(members) == clients:
            return members
        parts = merge_groups(members, clients) if len(members) > clients else divide_groups(members, clients)
        log_groups(self.name, parts, groups)
        return parts

    def names(self, parts: Sequence[np.ndarray], groups: np.ndarray | None = None) -> list[str]:
        """Name each client after its groups, see `fdl.datamodules.group_names`.

        Args:
            parts: indices of each client's samples, as returned by `split`.
            groups: natural client or domain of each sample, [n] of any type.
        """
        return group_names(parts, groups)


def _require_positive(key: str, value: float) -> None:
    if not (value > 0 and np.isfinite(value)):
        raise UserError(f"{key} must be a finite number > 0, got {value}")


def _require_at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{key} must be at least 1, got {value}")
