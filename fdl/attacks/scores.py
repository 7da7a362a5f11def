"""Scores of membership: functions of how sure models are, each larger the more a sample looks trained on.

All take φ = ln p_y − ln(1 − p_y) of each sample (`fdl.attacks.signals.log_odds`), compare samples only within their
group, and treat every sample alike: permuted samples get permuted scores.
"""

from __future__ import annotations

import numpy as np

MANY_SHADOWS = 64
"""From so many shadows on each sample has a variance of its own; with fewer, those of a group share one."""

_LEAST_STD = 1e-6


def loss_threshold(phi: np.ndarray) -> np.ndarray:
    """Minus the loss: members have the smaller one (Yeom et al., 2018, attack 1).

    Args:
        phi: [n].

    Returns:
        ln p_y, [n].
    """
    return _log_p(phi)


def lira(phi: np.ndarray, shadows: np.ndarray, inside: np.ndarray, groups: np.ndarray, online: bool) -> np.ndarray:
    """Likelihood ratio of Gaussians fitted to shadow models (Carlini et al., 2022, algorithm 1).

    Online: ln N(φ; μ_in, σ_in) − ln N(φ; μ_out, σ_out). Offline, which needs no model that was trained on the sample:
    −ln Pr[N(μ_out, σ_out) > φ], which orders samples as 1 − Pr does and does not round to 1.

    Args:
        phi: of the attacked model, [n].
        shadows: of shadow models, [S, n]; NaN where there is none.
        inside: whether a shadow was trained on a sample, [S, n].
        groups: samples with one variance where there are few shadows, int [n].
        online: which of the two.
    """
    from scipy.stats import norm

    mean_out, std_out = _fit(shadows, ~inside, groups)
    if not online:
        return -norm.logsf(phi, mean_out, std_out)
    mean_in, std_in = _fit(shadows, inside, groups)
    return norm.logpdf(phi, mean_in, std_in) - norm.logpdf(phi, mean_out, std_out)


def rmia(
    phi: np.ndarray,
    shadows: np.ndarray,
    inside: np.ndarray,
    groups: np.ndarray,
    online: bool,
    gamma: float = 1.0,
    a: float = 0.3,
) -> np.ndarray:
    """Share of other samples that a sample beats by γ in its likelihood ratio (Zarifzadeh et al., 2024, eqs. 3 and 10).

    score(x) = Pr_z[ (p(x|θ) / p(x)) / (p(z|θ) / p(z)) ≥ γ ], with p(x) the mean of reference models, half of which were
    trained on x. Offline it is guessed from those that were not, as p(x) = ((1 + a) p_out(x) + (1 − a)) / 2.

    Args:
        phi: of the attacked model, [n].
        shadows: of the reference models, [S, n]; NaN where there is none.
        inside: whether a reference was trained on a sample, [S, n].
        groups: z runs over the other samples of the group of x, int [n].
        online: whether p(x) may rest on models that were trained on x.
        gamma: γ, > 0.
        a: how much more a model that was trained on x is sure of it, offline, in [0, 1].
    """
    p = np.exp(_log_p(shadows))
    out = _mean(p, ~inside)
    prior = (_mean(p, inside) + out) / 2 if online else ((1 + a) * out + (1 - a)) / 2
    ratio = _log_p(phi) - np.log(np.maximum(prior, np.finfo(float).tiny))
    scores = np.full(len(phi), np.nan)
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & ~np.isnan(ratio))
        ordered = np.sort(ratio[rows])
        beaten = np.searchsorted(ordered, ratio[rows] - np.log(gamma), side="right") - (gamma <= 1)  # not itself
        scores[rows] = beaten / max(len(rows) - 1, 1)
    return scores


def _log_p(phi: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return -np.logaddexp(0.0, -phi)


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean of each column over some rows; NaN where there are none."""
    where = where & ~np.isnan(values)
    total = np.where(where, values, 0.0).sum(0)
    return np.divide(total, where.sum(0), out=np.full(values.shape[1], np.nan), where=where.any(0))


def _fit(shadows: np.ndarray, where: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column over some rows."""
    mean = _mean(shadows, where)
    squares = np.square(shadows - mean)
    count = (where & ~np.isnan(shadows)).sum(0)
    variance = _mean(squares, where) * count / np.maximum(count - 1, 1)
    if len(shadows) < MANY_SHADOWS:
        freedom = np.maximum(count - 1, 0)
        for group in np.unique(groups):
            rows = (groups == group) & ~np.isnan(variance)
            if rows.any():
                variance[rows] = (variance * freedom)[rows].sum() / max(freedom[rows].sum(), 1)
    return mean, np.sqrt(np.maximum(variance, _LEAST_STD**2))
