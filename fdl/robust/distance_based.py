"""Rules that look at the distances between clients' vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.robust.base import WeighingRule
from fdl.robust.votes import UpdateBlock
from fdl.utils.arguments import at_least, positive

_TINY = torch.finfo(torch.float64).tiny
_CLAMP = 1e-12
_FAR = 1e6
"""A vector this many times farther off than half of the others is left out of a geometric median: its pull is bounded,
but its rounding errors are not."""


class GeometricMedian(WeighingRule):
    """The point with the least sum of distances to all vectors, weighted by shares (Weiszfeld's algorithm).

    Pillutla et al., "Robust Aggregation for Federated Learning", 2022. It lies between the vectors, so that answers
    stay on the simplex, and near most of them whatever less than half of the weight says.

    Args:
        iterations: of Weiszfeld's algorithm at most, ≥ 1.
        tolerance: it ends when no weight moves by more; > 0.
        max_client_share: as for every rule.

    Example:
        >>> import torch
        >>> from fdl.robust.votes import UpdateBlock
        >>> values = torch.tensor([1.0, 2.0, 3.0, 99.0], dtype=torch.float64).reshape(4, 1, 1)  # of four clients
        >>> shares = torch.full((4, 1), 0.25, dtype=torch.float64)
        >>> votes = UpdateBlock(shares, shares > 0, lambda: iter([values]))
        >>> value, weights = GeometricMedian().combine(votes)
        >>> bool(1.9 < value.item() < 3.1)
        True
    """

    name = "geometric_median"

    def __init__(self, iterations: int = 200, tolerance: float = 1e-9, max_client_share: float | None = 2.0):
        super().__init__(max_client_share)
        self.iterations, self.tolerance = at_least("iterations", iterations, 1), positive("tolerance", tolerance)

    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """Shares over distances to the median, normalised, found by iteration; no vector but only distances is needed.

        The squared distance of x_i to Σ a_j x_j with Σ a_j = 1 is Σ_j a_j d²_ij − ½ Σ_jk a_j a_k d²_jk. It begins
        around the vector with the least sum of distances, which no outlier can move.
        """
        squares, shares, present = votes.squares, votes.shares.T, votes.answered.T
        away = squares.sqrt()
        sums = (away @ shares.unsqueeze(2)).squeeze(2).masked_fill(~present, torch.inf)
        from_medoid = away[torch.arange(len(away)), sums.argmin(1)]
        typical = from_medoid.masked_fill(~present, torch.nan).nanquantile(0.5, dim=1, keepdim=True).nan_to_num(0.0)
        near = present & (from_medoid <= _FAR * typical.clamp_min(_CLAMP))
        shares = shares.where(near, 0.0)
        squares = squares.where(near.unsqueeze(1) & near.unsqueeze(2), 0.0)
        weights = _normalised(shares / torch.maximum(from_medoid, typical).clamp_min(_CLAMP))
        for _ in range(self.iterations):
            spread = (squares @ weights.unsqueeze(2)).squeeze(2)
            distance = (spread - (weights * spread).sum(1, keepdim=True) / 2).clamp_min(0).sqrt()
            before, weights = weights, _normalised(shares / distance.clamp_min(_CLAMP))
            if not (weights - before).abs().amax() > self.tolerance:
                break
        return weights.T


class MultiKrum(WeighingRule):
    """Mean of the vectors that lie closest to their neighbours, weighted by shares.

    Blanchard et al., "Machine Learning with Adversaries", 2017: a vector's score is the sum of its n − f − 2 smallest
    squared distances to others; the best are kept. Which are kept does not depend on shares. It tolerates f liars
    among n ≥ 2 f + 3.

    Args:
        num_attackers: f, the number of attackers that are tolerated, ≥ 0.
        keep: how many vectors are kept, ≥ 1; None for n − f.
        max_client_share: as for every rule.
    """

    name = "multi_krum"
    uploads_per_attacker = 2
    extra_uploads = 3

    def __init__(self, num_attackers: int = 1, keep: int | None = None, max_client_share: float | None = 2.0):
        super().__init__(max_client_share)
        self.num_attackers, self.keep = (
            at_least("num_attackers", num_attackers, 0),
            None if keep is None else at_least("keep", keep, 1),
        )

    @property
    def min_clients(self) -> int:
        """2 f + 3."""
        return self.uploads_per_attacker * self.num_attackers + self.extra_uploads

    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """Shares of those that are kept, normalised; of equal scores the client with the smaller id comes first."""
        present, count = votes.answered.T, votes.counts.unsqueeze(1)
        others = present.unsqueeze(1) & present.unsqueeze(2) & ~torch.eye(present.shape[1], dtype=torch.bool)
        squares = votes.squares.masked_fill(~others, torch.inf).sort(dim=2).values
        counted = torch.arange(present.shape[1]) < (count - self.num_attackers - 2).clamp_min(1).unsqueeze(2)
        scores = squares.masked_fill(~counted, 0.0).sum(2).masked_fill(~present, torch.inf)
        place = scores.argsort(dim=1, stable=True).argsort(dim=1)
        kept = present & (place < (count - self.num_attackers if self.keep is None else self.keep))
        return _normalised(votes.shares.T.where(kept, 0.0)).T


class Krum(MultiKrum):
    """The one vector that lies closest to its n − f − 2 nearest neighbours (Blanchard et al., 2017).

    Args:
        num_attackers: f, the number of attackers that are tolerated among n ≥ 2 f + 3.
        max_client_share: as for every rule; a single vector has no use for shares.

    Example:
        >>> import torch
        >>> from fdl.robust.votes import UpdateBlock
        >>> values = torch.tensor([1.0, 2.0, 3.0, 99.0], dtype=torch.float64).reshape(4, 1, 1)  # of four clients
        >>> shares = torch.full((4, 1), 0.25, dtype=torch.float64)
        >>> votes = UpdateBlock(shares, shares > 0, lambda: iter([values]))
        >>> Krum(num_attackers=1).coefficients(votes).flatten()  # one that has a near neighbour gets all
        tensor([1., 0., 0., 0.], dtype=torch.float64)
    """

    name = "krum"

    def __init__(self, num_attackers: int = 1, max_client_share: float | None = 2.0):
        super().__init__(num_attackers, 1, max_client_share)


class Cronus(WeighingRule):
    """Mean of what is left of every row after filtering twice along its direction of largest variance.

    Chang et al., "Cronus", 2019, after Diakonikolas et al., "Being Robust (in High Dimensions) Can Be Practical", 2017:
    liars that shift a mean must add variance in some direction. The paper draws whom to drop at random, by the
    projection; as Roux et al. (arXiv 2402.12265) do, each of two passes drops those with the largest projection on the
    top eigenvector of the covariance, a share ε / 2 of the clients, rounded up. Covariance and mean are weighted by
    shares; of equal projections all are kept.

    Args:
        epsilon: ε, the share of liars that is tolerated, in (0, 0.5).
        max_client_share: as for every rule.
    """

    name = "cronus"

    def __init__(self, epsilon: float = 0.2, max_client_share: float | None = 2.0):
        super().__init__(max_client_share)
        if not 0 < epsilon < 0.5:
            raise UserError(f"epsilon must be in (0, 0.5), got {epsilon}")
        self.epsilon = epsilon

    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """Shares of those that are left, normalised."""
        weights, present = votes.shares.T, votes.answered.T
        drop = torch.ceil(votes.counts * self.epsilon / 2 - 1e-9).long()
        for _ in range(2):
            weights = _normalised(weights.where(present, 0.0))
            scores = _along_top(votes.squares, weights).masked_fill(~present, torch.inf)
            last = (present.sum(1) - drop - 1).clamp_min(0)
            bound = scores.sort(dim=1).values.gather(1, last.unsqueeze(1))
            present = present & (scores <= bound * (1 + 1e-9))
        return _normalised(weights.where(present, 0.0)).T


class NormClipping(WeighingRule):
    """Mean by shares of vectors that are scaled down to a largest length (Sun et al., 2019).

    Lengths are those of displacements: of weights from the global model, of answers from all classes alike. A liar then
    pulls no harder than others, but as hard.

    Args:
        limit: the largest length, > 0; None for the median of the round's lengths, row by row.
        max_client_share: as for every rule.

    Example:
        >>> import torch
        >>> from fdl.robust.votes import UpdateBlock
        >>> values = torch.tensor([1.0, 2.0, 3.0, 99.0], dtype=torch.float64).reshape(4, 1, 1)  # of four clients
        >>> shares = torch.full((4, 1), 0.25, dtype=torch.float64)
        >>> votes = UpdateBlock(shares, shares > 0, lambda: iter([values]))
        >>> NormClipping(limit=2.0).coefficients(votes).flatten()
        tensor([0.2500, 0.2500, 0.1667, 0.0051], dtype=torch.float64)
    """

    name = "norm_clipping"

    def __init__(self, limit: float | None = None, max_client_share: float | None = 2.0):
        super().__init__(max_client_share)
        self.limit = None if limit is None else positive("limit", limit)

    def coefficients(self, votes: UpdateBlock) -> Tensor:
        """Shares times min(1, limit over length)."""
        limit = self.limit
        if limit is None:
            lengths = votes.norms.masked_fill(~votes.answered.T, torch.nan)
            limit = lengths.nanquantile(0.5, dim=1, keepdim=True).nan_to_num(0.0)
        factor = torch.as_tensor(limit, dtype=torch.float64) / votes.norms.clamp_min(_TINY)
        return votes.shares * factor.clamp_max(1.0).T


def _normalised(weights: Tensor) -> Tensor:
    """Rows that sum to 1, or are 0."""
    return weights / weights.sum(1, keepdim=True).clamp_min(_TINY)


def _along_top(squares: Tensor, weights: Tensor) -> Tensor:
    """Absolute projections of vectors on the direction of their largest weighted variance, up to a factor a row.

    With K the inner products of x_i − Σ w_j x_j, the direction is Σ √w_j u_j (x_j − mean) of the top eigenvector u of
    √w K √w.

    Args:
        squares: squared distances, float64 [R, n, n].
        weights: w, float64 [R, n], that sum to 1.
    """
    spread = (squares @ weights.unsqueeze(2)).squeeze(2)
    mean = (weights * spread).sum(1)
    centred = (spread.unsqueeze(1) + spread.unsqueeze(2) - squares - mean[:, None, None]) / 2
    root = weights.sqrt()
    # one outlier of any size must not overflow the others' eigenvectors
    scale = centred.abs().amax(dim=(1, 2), keepdim=True).clamp_min(_TINY)
    top = torch.linalg.eigh(root.unsqueeze(1) * (centred / scale) * root.unsqueeze(2)).eigenvectors[:, :, -1]
    return ((centred / scale) @ (root * top).unsqueeze(2)).squeeze(2).abs()
