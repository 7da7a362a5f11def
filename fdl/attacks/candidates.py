"""Candidates of membership inference: private samples, and as many held-out ones from the same distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fdl.datamodules.samples import Samples, as_indices
from fdl.errors import UserError
from fdl.modules.types import Batch, Inputs
from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.participants import Client


class ConcatSamples(Samples):
    """Concatenation of several sample sets.

    Args:
        parts: the sets, of one kind.
        rows: rows of the concatenation to select, int [n]; None for all in order.
    """

    def __init__(self, parts: Sequence[Samples], rows: Any = None):
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)])
        total = int(self._starts[-1])
        self.rows = torch.arange(total) if rows is None else as_indices(rows, total)
        labels = [part.labels for part in self.parts]
        self.labels = None if any(own is None for own in labels) else torch.cat(labels)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs, estimated from the mean size over all sets."""
        return sum(part.nbytes for part in self.parts) * len(self) // max(int(self._starts[-1]), 1)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather a batch of inputs, each from its own set, with labels.

        Args:
            indices: positions of the samples, int64 [B].
            generator: source of random augmentations; None for none.
        """
        rows = self.rows[indices].numpy()
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        places, inputs = [], []
        for i in np.unique(owner) if len(rows) else [0]:
            mine = np.flatnonzero(owner == i)
            places.append(torch.from_numpy(mine))
            inputs.append(self.parts[i].batch(torch.from_numpy(rows[mine] - self._starts[i]), generator)[0])
        order = torch.cat(places).argsort()
        return _ordered(inputs, order), None if self.labels is None else self.labels[indices]

    def subset(self, indices: Any) -> ConcatSamples:
        """Select samples by position, in the given order.

        Args:
            indices: the positions.
        """
        return ConcatSamples(self.parts, self.rows[as_indices(indices, len(self))])

    def unlabelled(self) -> ConcatSamples:
        """Return the same inputs without labels."""
        return ConcatSamples([part.unlabelled() for part in self.parts], self.rows)

    def content_hash(self) -> str:
        """Return the hashes of the sets with the selected rows."""
        return "/".join([*(part.content_hash() for part in self.parts), self.rows.numpy().tobytes().hex()])


def _ordered(parts: Sequence[Inputs], order: Tensor) -> Inputs:
    """Concatenate batches, with token sequences padded to the longest, and reorder the rows."""
    if isinstance(parts[0], tuple):
        return tuple(_ordered(column, order) for column in zip(*parts))
    if not parts[0].is_floating_point() and parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
    return torch.cat(list(parts))[order]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Samples whose membership in a client's training set the attacks infer.

    For every client and class, half of the candidates are members, which the client trained on, and half are
    non-members, which no client trained on: held-out samples of the data's test and validation sets. Neither a client's
    label distribution nor the size of a set therefore tells members from non-members. The evaluation assumes that
    within a class, held-out and private samples come from one distribution, which holds if they were drawn from one
    pool and the clients differ in labels only.

    Attributes:
        samples: all candidates, [n].
        labels: their classes, int64 [n].
        owner: id of the client whose training set is in question, per candidate, int64 [n].
        member: True for members, bool [n].
        place: a member's row among its client's training samples, a non-member's row in `population`, int64 [n].
        population: the held-out samples.
    """

    samples: Samples
    labels: np.ndarray
    owner: np.ndarray
    member: np.ndarray
    place: np.ndarray
    population: Samples

    def share(self, client: Client, inside: np.ndarray) -> ConcatSamples:
        """Return the training set of a client's shadow: its samples that are no candidates, and some candidates.

        Args:
            client: the client whose training samples are taken.
            inside: mask of the candidates to include, bool [n].
        """
        mine = self.owner == client.id
        others = np.setdiff1d(np.arange(len(client.train)), self.place[mine & self.member])
        members, strangers = self.place[mine & inside & self.member], self.place[mine & inside & ~self.member]
        return ConcatSamples(
            [client.train, self.population], np.concatenate([others, members, len(client.train) + strangers])
        )

    def halves(self, stream: np.random.Generator) -> np.ndarray:
        """Draw half of each client's candidates of each class, which is as many as are members.

        Args:
            stream: random generator of the draw.

        Returns:
            Mask of the drawn candidates, bool [n].
        """
        mixed = stream.permutation(len(self.owner))
        order = mixed[np.lexsort((self.labels[mixed], self.owner[mixed]))]
        group = np.stack([self.owner[order], self.labels[order]])
        starts = np.flatnonzero(np.r_[True, (group[:, 1:] != group[:, :-1]).any(0)])
        sizes = np.diff(np.r_[starts, len(order)])
        place = np.arange(len(order)) - np.repeat(starts, sizes)
        inside = np.zeros(len(order), dtype=bool)
        inside[order[place < np.repeat(sizes // 2, sizes)]] = True
        return inside


def candidates(subject: AttackTarget) -> Candidates:
    """Draw the candidates of a run, once for all attacks.

    Held-out samples of a class are distributed over the clients in proportion to their numbers of samples of it, each
    to one client.

    Args:
        subject: the run.

    Raises:
        UserError: no samples are held out, samples have no labels, or they arrive over time.
    """
    return subject.cached("candidates", lambda: _draw(subject))


def _draw(subject: AttackTarget) -> Candidates:
    server = subject.server
    population = ConcatSamples([part for part in (server.test, server.validation) if len(part)] or [server.test])
    participated = {int(id) for record in subject.loop.history for id in record["clients"]}
    clients = [client for client in subject.clients if client.id in participated and len(client.train)]
    if server.arrival is not None:
        raise UserError("membership inference needs data that are all there from the first, and these arrive over time")
    if not clients or len(population) == 0 or population.labels is None:
        raise UserError("membership inference needs labelled test or validation samples that nobody trained on")
    rows: list[tuple[int, bool, int]] = []
    strangers = numpy_stream(subject.seed, "attack/population").permutation(len(population))
    classes = population.labels.numpy()[strangers]
    for label in range(subject.server.num_classes):
        free = strangers[classes == label]
        held = [np.flatnonzero(client.train.labels.numpy() == label) for client in clients]
        counts = np.array([len(own) for own in held])
        ends = np.cumsum(counts) * min(len(free) / max(counts.sum(), 1), 1.0)
        ends = np.floor(ends + 0.5).astype(int)  # each gets its rounded share, but at most as many as it holds
        for client, own, low, high in zip(clients, held, [0, *ends[:-1]], ends):
            stream = numpy_stream(subject.seed, f"attack/members/{label}", 0, client.id)
            rows += [(client.id, False, row) for row in free[low:high]]
            rows += [(client.id, True, row) for row in stream.permutation(own)[: high - low]]
    if not rows:
        raise UserError("membership inference: no held-out sample has a class that a client holds")
    owner, member, place = (np.array(column) for column in zip(*rows))
    starts = dict(zip([c.id for c in clients], np.cumsum([0, *(len(c.train) for c in clients)])))
    end = sum(len(client.train) for client in clients)
    everything = ConcatSamples([*(client.train for client in clients), population])
    base = np.array([starts[i] if m else end for i, m in zip(owner, member)])
    samples = everything.subset(base + place)
    return Candidates(samples, samples.labels.numpy(), owner, member, place, population)
