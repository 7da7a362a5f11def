"""Mixture of the clients' next-token predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.shares import CAP, Cap
from fdl.knowledge.confidence.base import LIMIT
from fdl.messages import Message
from fdl.messages.sparse_responses import FLOOR, SparseResponses

_SLACK = 1e-3
_POSITIONS = 1 << 14  # positions that are merged at a time
_NO_ID = torch.iinfo(torch.int32).max  # placeholder for an id: sorts behind all others


@dataclass(frozen=True, eq=False)
class TokenKnowledge:
    """Mixture of a round's next-token predictions, for the windows that at least one client predicted.

    Attributes:
        rows: the windows, int64 [m], ascending.
        ids: int32 [m, T, C], most likely first; -1 with probability 0 where there are fewer.
        probabilities: float32 [m, T, C]; the remainder to 1 belongs to all other ids.
        coverage: number of clients that predicted, int64 [m, T].
        log_weight: logarithm of the sum of their weights, float32 [m, T]; -inf without a prediction.
    """

    rows: Tensor
    ids: Tensor
    probabilities: Tensor
    coverage: Tensor
    log_weight: Tensor

    def message(self, vocab: int, k: int) -> SparseResponses:
        """Convert the k most likely ids to a message.

        Args:
            vocab: size of the vocabulary.
            k: most ids per position.
        """
        p, ids = self.probabilities[..., :k], self.ids[..., :k]
        kept = p >= FLOOR
        tail = (1 - p.double().mul(kept).sum(2)).clamp_min(FLOOR).log().float()
        order = ids.masked_fill(~kept, _NO_ID).argsort(dim=2)
        ids, p, kept = (x.gather(2, order) for x in (ids, p, kept))
        sizes = kept.sum(2, dtype=torch.int32)
        return SparseResponses(ids[kept].int(), p[kept].log(), sizes, vocab, tail, rows=self.rows)


class TokenMixture(Aggregate):
    """Mean over clients of their next-token distributions, weighted by the softmax over clients of log-weights.

    With a cap, no client has more than a multiple of an equal share, whatever it declares. The cap can be applied only
    once all uploads have arrived: messages are kept until then, at 8 bytes per id. Without a cap, or with uniform
    weights, memory grows with the proxy text only: the softmax is computed online, with the largest log-weight of each
    position so far, and sums relative to it.

    For every position the `capacity` ids with the most probability so far are kept, at 8 bytes each, and the rest is
    added to the tail. With a capacity of the vocabulary, or of all ids that clients upload, nothing is lost. Ids that a
    client does not upload count as part of its tail, so the mixture gives an id no more than its uploaded probability.

    Args:
        rows: the windows that clients predict, int64 [m], ascending.
        length: positions per window, T.
        vocab: size of the vocabulary.
        most: most ids per position that a client may upload.
        capacity: ids per position that are kept.
        weighted: True rejects predictions without weights, False rejects those with weights.
        cap: the most weight that one client may have; None for no limit.
    """

    def __init__(
        self,
        rows: Tensor,
        length: int,
        vocab: int,
        most: int,
        capacity: int,
        weighted: bool,
        cap: Cap | None = CAP,
    ):
        self.rows, self.length, self.vocab, self.most, self.weighted = rows, length, vocab, most, weighted
        self.capacity, self.cap = min(capacity, vocab), cap if weighted else None
        count = len(rows) * length
        self.clients = 0
        self._pending: list[tuple[int, SparseResponses]] = []
        self._largest = torch.full((count,), -torch.inf, dtype=torch.float64)
        self._weight = torch.zeros(count, dtype=torch.float64)
        self._coverage = torch.zeros(count, dtype=torch.int64)
        self._ids = torch.full((count, self.capacity), _NO_ID, dtype=torch.int32)
        self._mass = torch.zeros(count, self.capacity)

    def add(self, message: Message, client: int) -> None:
        """Add one client's predictions.

        Args:
            message: sparse responses for some of the windows or all.
            client: id of the sender.

        Raises:
            RejectedMessageError: the predictions do not fit; the mixture is unchanged.
        """
        places, log_weights = self._checked(message)
        if self.cap is None:
            self._accumulate(message, places, log_weights)
        else:
            self._pending.append((client, message))
        self.clients += 1

    def _capped(self) -> TokenMixture:
        """The mixture of all pending messages, with capped log-weights."""
        told = [message for _, message in sorted(self._pending, key=lambda waiting: waiting[0])]
        logs = torch.full((len(told), len(self._largest)), -torch.inf, dtype=torch.float64)
        for own, message in zip(logs, told):
            places, log_weights = self._checked(message)
            own[places] = log_weights.masked_fill(message.sizes.flatten() == 0, -torch.inf)
        settings = self.rows, self.length, self.vocab, self.most, self.capacity, self.weighted
        mixture = TokenMixture(*settings, cap=None)
        for own, message in zip(self.cap.limit(logs), told):
            places = self._checked(message)[0]
            mixture._accumulate(message, places, own[places])
        mixture.clients = self.clients
        return mixture

    def _accumulate(self, message: SparseResponses, places: Tensor, log_weights: Tensor) -> None:
        """Add one client's predictions, with the log-weight of each position."""
        sizes, position = message.sizes.flatten(), 0
        ids, p = message.ids, normalized_probabilities(message)
        for start in range(0, len(places), _POSITIONS):
            some = slice(start, start + _POSITIONS)
            count = int(sizes[some].sum())
            part = slice(position, position + count)
            self._merge(places[some], sizes[some], log_weights[some], ids[part], p[part])
            position += count

    def result(self) -> TokenKnowledge | None:
        """The mixture; None without uploads."""
        if self.clients == 0:
            return None
        if self._pending:
            return self._capped().result()
        windows = (self._coverage.view(-1, self.length) > 0).any(1)
        used = max(1, int((self._mass > 0).sum(1).max())) if len(self._mass) else 1
        if used == self.vocab:  # list all ids, some with probability 0, so that nothing is left for a tail
            named = self._ids.where(self._mass > 0, 0).long()
            mass, ids = torch.zeros_like(self._mass).scatter_add_(1, named, self._mass).sort(dim=1, descending=True)
        else:
            mass, order = self._mass.sort(dim=1, descending=True, stable=True)
            mass, ids = mass[:, :used], self._ids.gather(1, order[:, :used])
            ids = ids.masked_fill(mass == 0, -1)
        ids = ids.masked_fill((self._coverage == 0).unsqueeze(1), -1)
        mass = mass / self._weight.where(self._weight > 0, 1.0).unsqueeze(1)
        shape = (-1, self.length, used)
        return TokenKnowledge(
            self.rows[windows],
            ids.int().view(shape)[windows],
            mass.float().view(shape)[windows],
            self._coverage.view(-1, self.length)[windows],
            (self._largest + self._weight.log()).float().view(-1, self.length)[windows],
        )

    def _merge(self, places: Tensor, sizes: Tensor, log_weights: Tensor, ids: Tensor, p: Tensor) -> None:
        """Add one client's distributions at some positions."""
        answered = sizes > 0
        places, sizes, log_weights = places[answered], sizes[answered], log_weights[answered]
        if len(places) == 0:
            return
        together = torch.maximum(self._largest[places], log_weights)
        before, new = (self._largest[places] - together).exp(), (log_weights - together).exp()
        self._largest[places] = together
        self._weight[places] = self._weight[places] * before + new
        self._coverage[places] += 1
        new_ids, new_mass = pad_ids(ids, p, sizes)
        new_mass = (new_mass * new.unsqueeze(1)).float()
        ids = torch.cat([self._ids[places], new_ids], dim=1)
        mass = torch.cat([(self._mass[places] * before.unsqueeze(1)).float(), new_mass], dim=1)
        ids, order = ids.sort(dim=1)
        mass = mass.gather(1, order)
        # each side has an id once, so at most two neighbours are equal
        twice = ids[:, 1:] == ids[:, :-1]
        mass[:, :-1] += mass[:, 1:] * twice
        mass[:, 1:].masked_fill_(twice, 0)
        mass, order = mass.topk(self.capacity, dim=1)
        self._ids[places] = ids.gather(1, order).masked_fill_(mass == 0, _NO_ID)
        self._mass[places] = mass

    def _checked(self, message: Message) -> tuple[Tensor, Tensor]:
        """The predicted positions among those of all windows, int64 [n·T], and their log-weights, float64 [n·T]."""
        if not isinstance(message, SparseResponses):
            raise RejectedMessageError(f"expected sparse responses, got {message.kind}")
        if message.vocab != self.vocab:
            raise RejectedMessageError(f"answers over a vocabulary of {message.vocab}, expected {self.vocab}")
        sizes, rows = message.sizes, message.rows
        if sizes.shape[1] != self.length:
            raise RejectedMessageError(f"windows of {sizes.shape[1]} positions, expected {self.length}")
        if sizes.numel() and int(sizes.max()) > self.most:
            raise RejectedMessageError(f"{int(sizes.max())} ids at a position, expected {self.most} at most")
        if rows is None:
            if len(sizes) != len(self.rows):
                raise RejectedMessageError(f"expected answers to all {len(self.rows)} windows, got {len(sizes)}")
            windows = torch.arange(len(self.rows))
        else:
            windows = torch.searchsorted(self.rows, rows).clamp_max(max(len(self.rows) - 1, 0))
            if len(self.rows) == 0 or not torch.equal(self.rows[windows], rows):
                raise RejectedMessageError("a window is answered that was not asked")
            if not (rows.diff() > 0).all():
                raise RejectedMessageError("windows are not in order, or one is answered twice")
        if (message.weights is None) == self.weighted:
            raise RejectedMessageError(
                "answers without weights" if self.weighted else "answers with weights not asked for"
            )
        places = (windows.unsqueeze(1) * self.length + torch.arange(self.length)).flatten()
        if message.weights is None:
            return places, torch.zeros(sizes.numel(), dtype=torch.float64)
        log_weights = message.weights.values().double().flatten()
        if not (torch.isfinite(log_weights).all() and (log_weights <= LIMIT + _SLACK + message.weights.step).all()):
            raise RejectedMessageError(f"a log-weight is above {LIMIT:g}, or not finite")
        return places, log_weights


def normalized_probabilities(message: SparseResponses) -> Tensor:
    """Probabilities of the ids of a message, float64 [S].

    They are normalised after rounding in transmission: ids and tail of a position sum to 1, so that no client has more
    than one vote.

    Args:
        message: predictions of one client, with S ids in total.
    """
    counts = message.sizes.flatten()
    if message.form == "sampled":
        p, rest = message.values.double(), torch.zeros(len(counts), dtype=torch.float64)
    else:
        p, rest = message.values.double().exp(), message.tail.flatten().double().exp()
    total = rest.index_add(0, message.positions, p)
    return p / total[message.positions]


def pad_ids(ids: Tensor, p: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the ids and probabilities of M positions to the same length K, the largest number of ids.

    Args:
        ids: ids of all positions, concatenated, [S].
        p: their probabilities, [S].
        sizes: number of ids per position, [M].

    Returns:
        Ids int32 [M, K], padded by the largest integer, and probabilities [M, K], padded by 0.
    """
    named = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
    wide_ids, wide_p = torch.full(named.shape, _NO_ID, dtype=torch.int32), p.new_zeros(named.shape)
    wide_ids[named], wide_p[named] = ids.int(), p
    return wide_ids, wide_p
