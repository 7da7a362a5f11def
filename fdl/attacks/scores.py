"""Membership scores: functions of models' log-odds, larger for samples that were more likely trained on.

All take φ = ln p_y − ln(1 − p_y) of each sample (`fdl.attacks.signals.log_odds`), compare samples only within their
group, and are equivariant: permuted samples get permuted scores.
"""

from __future__ import annotations

import numpy as np

MANY_SHADOWS = 64
"""Number of shadows from which on each sample has its own variance; with fewer, samples of a group share one."""

_LEAST_STD = 1e-6


def loss_threshold(phi: np.ndarray) -> np.ndarray:
    """Compute the negative loss, which is larger for members (Yeom et al., 2018, attack 1).

    Args:
        phi: log-odds of the attacked model, [n].

    Returns:
        ln p_y, [n].
    """
    return _log_p(phi)


def lira(phi: np.ndarray, shadows: np.ndarray, inside: np.ndarray, groups: np.ndarray, online: bool) -> np.ndarray:
    """Compute likelihood ratios of Gaussians fitted to shadow models (Carlini et al., 2022, algorithm 1).

    Online: ln N(φ; μ_in, σ_in) − ln N(φ; μ_out, σ_out). Offline, which needs no model that was trained on the sample:
    −ln Pr[N(μ_out, σ_out) > φ], which orders samples as 1 − Pr does and does not round to 1.

    Args:
        phi: log-odds of the attacked model, [n].
        shadows: log-odds of shadow models, [S, n]; NaN where a shadow has none.
        inside: True where a shadow was trained on a sample, bool [S, n].
        groups: groups of samples that share a variance if there are few shadows, int [n].
        online: True for the online score, False for the offline one.

    Returns:
        Scores, [n].
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
    """Compute the fraction of other samples whose likelihood ratio is exceeded (Zarifzadeh et al., 2024, eqs. 3, 10).

    score(x) = Pr_z[ (p(x|θ) / p(x)) / (p(z|θ) / p(z)) ≥ γ ], with p(x) the mean of reference models, half of which were
    trained on x. Offline it is estimated from those that were not, as p(x) = ((1 + a) p_out(x) + (1 − a)) / 2.

    Args:
        phi: log-odds of the attacked model, [n].
        shadows: log-odds of the reference models, [S, n]; NaN where a model has none.
        inside: True where a reference model was trained on a sample, bool [S, n].
        groups: groups of samples; z runs over the other samples of the group of x, int [n].
        online: True if p(x) may depend on models that were trained on x.
        gamma: γ, > 0.
        a: offline, coefficient of the linear model of p(x), in [0, 1].

    Returns:
        Scores in [0, 1], [n]; NaN for samples that cannot be scored.
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
    """Compute the mean of each column over the selected rows; NaN without any."""
    where = where & ~np.isnan(values)
    total = np.where(where, values, 0.0).sum(0)
    return np.divide(total, where.sum(0), out=np.full(values.shape[1], np.nan), where=where.any(0))


def _fit(shadows: np.ndarray, where: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean and standard deviation of each column over the selected rows."""
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
