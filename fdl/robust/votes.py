"""Input and output of robust aggregation rules.

A rule is given vectors of n clients for R rows: in the space of parameters one row of displacements from the global
model, in the space of knowledge a row for every proxy sample, with answers as displacements from "all classes alike".
Most rules need no more than the vectors' inner products, of which there are n² a row, so that large models are read in
blocks of columns and large proxy sets in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdl.knowledge.aggregation.shares import max_log_weight

if TYPE_CHECKING:
    from fdl.participants import Server

BLOCK_ELEMENTS = 1 << 21
"""Numbers in one block of vectors, so that a rule's working memory stays below some 100 MB."""

_EQUAL = 1e-12
"""Squared distance, as a share of the squared norms, that rounding may give to equal vectors."""

_SURE = 0.75
"""Quantile of the clients' shares of a row that claims are measured by; up to a fifth of the clients may exceed it."""


@dataclass(frozen=True, eq=False)
class UpdateBlock:
    """Vectors of n clients for some rows.

    Attributes:
        shares: float64 [n, R], weights before the rule: they sum to 1 in a row, and are 0 where a client says nothing.
        answered: bool [n, R], True if the client has a vector for the row.
        blocks: gives the vectors, some columns at a time: float64 [n, R, d], 0 where a client says nothing.
    """

    shares: Tensor
    answered: Tensor
    blocks: Callable[[], Iterator[Tensor]]

    @cached_property
    def counts(self) -> Tensor:
        """Number of clients with a vector per row, int64 [R]."""
        return self.answered.sum(0)

    @cached_property
    def claims(self) -> Tensor:
        """Relative confidence of each client in a row, float64 [n, R] in [0, 1], against the upper quartile of shares.

        It is ½ where all claim alike, near 1 where one claims to know more than most. Unlike a share it hardly depends
        on what a few liars claim.
        """
        known = self.shares.masked_fill(~self.answered, torch.nan)
        typical = known.nanquantile(_SURE, dim=0, interpolation="higher").nan_to_num(0.0)
        return self.shares / (self.shares + typical).clamp_min(torch.finfo(torch.float64).tiny)

    @cached_property
    def products(self) -> Tensor:
        """Inner products of all pairs of vectors, float64 [R, n, n]."""
        return sum((x.transpose(0, 1) @ x.permute(1, 2, 0) for x in self.blocks()), start=torch.zeros(()))

    @cached_property
    def norms(self) -> Tensor:
        """Lengths of the vectors, float64 [R, n]."""
        return self.products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()

    @cached_property
    def squares(self) -> Tensor:
        """Squared distances of all pairs, float64 [R, n, n]; no client's size blurs the distance of two others."""
        own = self.products.diagonal(dim1=1, dim2=2)
        both = own.unsqueeze(1) + own.unsqueeze(2)
        squares = both - 2 * self.products
        squares = torch.where(squares > _EQUAL * both, squares, 0.0)
        squares.diagonal(dim1=1, dim2=2).zero_()
        return squares

    def total(self, coefficients: Tensor) -> Tensor:
        """Return ``Σ_i a_ir x_ir``, float64 [R, D].

        Args:
            coefficients: a, float64 [n, R].
        """
        return torch.cat([torch.einsum("nr,nrd->rd", coefficients, x) for x in self.blocks()], dim=1)


@dataclass(frozen=True, eq=False)
class ClientUpdates:
    """Uploads of a round's clients, as a sequence of blocks of rows.

    Attributes:
        clients: their ids, ascending: what is decided does not depend on who came first.
        server: whose labelled samples may serve as a reference, and whose state remembers clients.
        votes: gives all rows, given the cap on a client's share of a row; None is no cap.
        reference: what the server would say alone, float64 [rows, D].
        bounded: whether vectors lie on the simplex, where nobody can be louder than others.
        memory: under which name the server's state remembers clients.
    """

    clients: Sequence[int]
    server: Server
    votes: Callable[[float | None], Iterator[UpdateBlock]]
    reference: Callable[[], Tensor]
    bounded: bool
    memory: str

    def reweighted(self, factors: Tensor) -> ClientUpdates:
        """Return the updates with each client's shares times its factor, [n]; a factor of 0 removes the client."""

        def votes(max_client_share: float | None) -> Iterator[UpdateBlock]:
            for one in self.votes(max_client_share):
                shares = one.shares * factors.unsqueeze(1)
                shares = shares / shares.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
                heard = one.answered & (factors > 0).unsqueeze(1)
                yield UpdateBlock(shares, heard, _masked(one.blocks, heard))

        return replace(self, votes=votes)


@dataclass(frozen=True, eq=False)
class Aggregated:
    """Result of a robust rule.

    Attributes:
        values: float64 [rows, D].
        weights: float64 [n, rows], how much of each client's vector is in it; all 0 in rows that nothing is known of.
    """

    values: Tensor
    weights: Tensor

    @property
    def decided(self) -> Tensor:
        """Mask of the rows with a result, bool [rows]."""
        return self.weights.sum(0) > 0


def _masked(blocks: Callable[[], Iterator[Tensor]], heard: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: (x.masked_fill(~heard.unsqueeze(2), 0.0) for x in blocks())


def cap_shares(log_weights: Tensor, max_client_share: float | None) -> Tensor:
    """Return shares of each row's weight, none above a multiple of an equal share.

    Args:
        log_weights: float64 [n, R]; -inf where a client says nothing.
        max_client_share: the multiple; None for no bound.

    Returns:
        float64 [n, R]: softmax over clients of what `shares.max_log_weight` leaves. Columns sum to 1, or are 0
        where nobody says anything.

    Example:
        >>> import torch
        >>> log_weights = torch.tensor([[0.0], [0.0], [9.0]], dtype=torch.float64)
        >>> cap_shares(log_weights, max_client_share=1.5).flatten()  # at most 1.5 of three equal shares
        tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    answered = torch.isfinite(log_weights)
    if max_client_share is not None:
        log_weights = torch.minimum(log_weights, max_log_weight(log_weights, max_client_share))
    return torch.softmax(log_weights.masked_fill(~answered.any(0), 0.0), dim=0).masked_fill(~answered, 0.0)


def log_client_weights(ballot: ClientUpdates, decision: Aggregated, plain: Tensor, what: str = "") -> None:
    """Log each client's share in the plain mean, by what the rule multiplies it, and how many are suppressed.

    Args:
        ballot: the clients' updates.
        decision: the result of the rule.
        plain: float64 [n, rows], weights in the plain mean.
        what: name of the model, if the method aggregates several.
    """
    ours, theirs = (x[:, decision.decided].sum(1) for x in (decision.weights, plain))
    heard = theirs > 0
    ratio = ours / theirs.where(heard, 1.0)
    place = f"robust/{what}/" if what else "robust/"
    shares = (theirs / theirs.sum()).tolist()
    for client, weight, share, known in zip(ballot.clients, ratio.tolist(), shares, heard.tolist()):
        if known:
            ballot.server.metrics[f"{place}weight/{client}"] = weight
            ballot.server.metrics[f"{place}plain/{client}"] = share
    ballot.server.metrics[f"{place}suppressed"] = float((ratio[heard] < 0.5).sum())
