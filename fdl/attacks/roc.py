"""ROC metrics of membership scores, and the bounds that differential privacy sets to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FALSE_POSITIVES = 10
"""False positives from which on a false-positive rate counts as resolved: 0.1 % of 10 000 non-members."""

RATES = {"0.1pct": 0.001, "1pct": 0.01}
"""False-positive rates at which attacks are compared, by their name in metrics."""

_THRESHOLDS = 512


@dataclass(frozen=True, eq=False)
class Roc:
    """Receiver operating characteristic; scores at or above a threshold count as positive (member).

    Attributes:
        fpr: false-positive rates, ascending from 0 to 1.
        tpr: true-positive rates at the same thresholds, ascending from 0 to 1.
        members: number of scored members.
        non_members: number of scored non-members.

    Example:
        >>> import numpy as np
        >>> roc = Roc.of(members=np.array([0.9, 0.8, 0.3]), non_members=np.array([0.5, 0.2, 0.1]))
        >>> print(f"{roc.auc:.3f} {roc.tpr_at(0.0):.3f}")
        0.889 0.667
    """

    fpr: np.ndarray
    tpr: np.ndarray
    members: int
    non_members: int

    @classmethod
    def of(cls, members: np.ndarray, non_members: np.ndarray) -> Roc:
        """Compute the curve of scores.

        Args:
            members: scores of members, [n], larger for stronger claims of membership.
            non_members: scores of non-members, [m].

        Raises:
            ValueError: there are no scores, or a score is NaN.
        """
        from sklearn.metrics import roc_curve

        truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
        fpr, tpr, _ = roc_curve(truth, _finite(np.r_[members, non_members]), drop_intermediate=False)
        return cls(fpr, tpr, len(members), len(non_members))

    @property
    def auc(self) -> float:
        """Area under the curve: the probability that a member scores above a non-member, ties counting one half."""
        from sklearn.metrics import auc

        return float(auc(self.fpr, self.tpr))

    @property
    def resolved(self) -> float:
        """Smallest false-positive rate that the non-members resolve; 1 for fewer than `FALSE_POSITIVES` of them."""
        return min(FALSE_POSITIVES / self.non_members, 1.0)

    def tpr_at(self, fpr: float) -> float:
        """Return the largest true-positive rate at a bounded false-positive rate.

        Args:
            fpr: upper bound of the false-positive rate, in [0, 1].
        """
        return float(self.tpr[self.fpr <= fpr].max())


def measure(members: np.ndarray, non_members: np.ndarray, stream: np.random.Generator) -> dict[str, float]:
    """Compute the metrics of an attack.

    Args:
        members: scores of members, [n].
        non_members: scores of non-members, [m].
        stream: random generator of the halves of `balanced_accuracy`.

    Returns:
        ``auc``; ``balanced_accuracy`` and ``advantage``, TPR − FPR, at a threshold chosen on other samples;
        ``tpr_at_<rate>_fpr`` for those of `RATES` that the non-members resolve; ``resolved_fpr``, the smallest resolved
        rate, and ``tpr_at_resolved_fpr``; ``members`` and ``non_members``, their numbers.
    """
    roc = Roc.of(members, non_members)
    balanced = balanced_accuracy(members, non_members, stream)
    rates = {f"tpr_at_{name}_fpr": roc.tpr_at(rate) for name, rate in RATES.items() if rate >= roc.resolved}
    return {
        "auc": roc.auc,
        "balanced_accuracy": balanced,
        "advantage": 2 * balanced - 1,
        **rates,
        "resolved_fpr": roc.resolved,
        "tpr_at_resolved_fpr": roc.tpr_at(roc.resolved),
        "members": len(members),
        "non_members": len(non_members),
    }


def balanced_accuracy(members: np.ndarray, non_members: np.ndarray, stream: np.random.Generator) -> float:
    """Compute the mean of both classes' accuracies at a threshold chosen on one half and measured on the other.

    Both halves are measured in this way and averaged. A threshold that is chosen and measured on the same samples would
    yield an accuracy above one half on pure noise.

    Args:
        members: scores of members, [n].
        non_members: scores of non-members, [m].
        stream: random generator of the halves.

    Returns:
        The balanced accuracy in [0, 1]; NaN with fewer than two members or non-members.
    """
    if min(len(members), len(non_members)) < 2:
        return math.nan
    (a, b), (c, d) = (_halves(_finite(scores), stream) for scores in (members, non_members))
    return (_accuracy_at_best_threshold(a, c, b, d) + _accuracy_at_best_threshold(b, d, a, c)) / 2


def _accuracy_at_best_threshold(
    members: np.ndarray, non_members: np.ndarray, others: np.ndarray, strangers: np.ndarray
) -> float:
    levels = np.unique(np.r_[members, non_members])
    thresholds = np.r_[levels[0], (levels[1:] + levels[:-1]) / 2, np.inf]
    gain = _fraction_above(members, thresholds) - _fraction_above(non_members, thresholds)
    threshold = thresholds[gain.argmax()]
    return float((others >= threshold).mean() + (strangers < threshold).mean()) / 2


def ceiling(fpr: np.ndarray, epsilon: float, delta: float) -> np.ndarray:
    """Bound the true-positive rate of any attack on an (ε, δ)-private mechanism (Kairouz et al., 2015, theorem 2.1).

    min(e^ε FPR + δ, 1 − e^−ε (1 − δ − FPR)).

    Args:
        fpr: false-positive rates.
        epsilon: ε ≥ 0; infinite for no privacy, with a bound of 1.
        delta: δ.

    Example:
        >>> import numpy as np
        >>> ceiling(np.array([0.0, 0.1]), epsilon=0.0, delta=0.0)  # no better than guessing
        array([0. , 0.1])
    """
    fpr = np.asarray(fpr, dtype=float)
    if math.isinf(epsilon):
        return np.ones_like(fpr)
    with np.errstate(over="ignore"):
        return np.clip(np.minimum(np.exp(epsilon) * fpr + delta, 1 - np.exp(-epsilon) * (1 - delta - fpr)), 0, 1)


def advantage_ceiling(epsilon: float, delta: float) -> float:
    """Bound TPR − FPR of any attack by (e^ε − 1 + 2δ) / (e^ε + 1), where both bounds of `ceiling` meet.

    Args:
        epsilon: ε ≥ 0.
        delta: δ.

    Example:
        >>> print(f"{advantage_ceiling(epsilon=1.0, delta=0.0):.3f}")
        0.462
    """
    return math.tanh(epsilon / 2) + delta * (1 - math.tanh(epsilon / 2))


def epsilon_lower(
    members: np.ndarray, non_members: np.ndarray, delta: float, level: float, stream: np.random.Generator
) -> float:
    """Compute a lower bound of the spent ε from an attack's scores, with confidence `level`.

    (ε, δ)-privacy implies four inequalities for TPR and FPR at every threshold: TPR ≤ e^ε FPR + δ, the same with FPR
    and TPR exchanged, and both for the rates of the opposite claim. One half of the samples selects the threshold and
    the inequality with the largest bound; the other half is then evaluated there, once, with Clopper–Pearson bounds of
    (1 + level) / 2 each for the two rates (Jagielski et al., 2020). The bounds assume that samples are independent
    given the attacked run.

    Args:
        members: scores of members, [n].
        non_members: scores of non-members, [m].
        delta: δ.
        level: confidence level: probability with which the bound does not exceed ε.
        stream: random generator of the halves.

    Returns:
        The bound, ≥ 0; 0 if the attack establishes none.
    """
    if min(len(members), len(non_members)) < 2:
        return 0.0
    (a, b), (c, d) = (_halves(_finite(scores), stream) for scores in (members, non_members))
    levels = np.unique(np.r_[a, c])
    thresholds = levels[np.linspace(0, len(levels) - 1, min(len(levels), _THRESHOLDS)).astype(int)]
    shown = _epsilon_bounds(
        _fraction_above(a, thresholds), _fraction_above(c, thresholds), len(a), len(c), delta, level
    )
    which, where = np.unravel_index(shown.argmax(), shown.shape)
    threshold = thresholds[[where]]
    return max(
        0.0,
        float(
            _epsilon_bounds(_fraction_above(b, threshold), _fraction_above(d, threshold), len(b), len(d), delta, level)[
                which, 0
            ]
        ),
    )


def _epsilon_bounds(tpr: np.ndarray, fpr: np.ndarray, n: int, m: int, delta: float, level: float) -> np.ndarray:
    """Compute lower bounds of ε from each of the four inequalities at each threshold, [4, T]."""
    alpha = (1 - level) / 2
    pairs = ((tpr, n, fpr, m), (fpr, m, tpr, n), (1 - fpr, m, 1 - tpr, n), (1 - tpr, n, 1 - fpr, m))
    with np.errstate(divide="ignore"):
        return np.stack(
            [
                np.log(np.maximum(lower_bound(high * i, i, alpha) - delta, 0.0))
                - np.log(upper_bound(low * j, j, alpha))
                for high, i, low, j in pairs
            ]
        )


def lower_bound(count: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Compute the Clopper–Pearson lower bound of a probability.

    Args:
        count: numbers of successes.
        n: number of trials.
        alpha: α, the probability of as many successes or more at the bound.
    """
    from scipy.stats import beta

    count = np.rint(count)
    return np.where(count > 0, beta.ppf(alpha, np.maximum(count, 1), n - count + 1), 0.0)


def upper_bound(count: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Compute the Clopper–Pearson upper bound of a probability.

    Args:
        count: numbers of successes.
        n: number of trials.
        alpha: α, the probability of as many successes or fewer at the bound.

    Example:
        >>> import numpy as np
        >>> upper_bound(np.array([0]), n=100, alpha=0.05).round(3)  # about 3 / n, the rule of three
        array([0.03])
    """
    return 1.0 - lower_bound(n - np.rint(count), n, alpha)


def _fraction_above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Compute the fraction of scores at or above each threshold."""
    return 1.0 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores)


def _halves(scores: np.ndarray, stream: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mixed = stream.permutation(scores)
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def _finite(scores: np.ndarray) -> np.ndarray:
    """Replace infinite scores by the largest finite numbers, which keeps their order."""
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
    return np.nan_to_num(scores, posinf=np.finfo(float).max / 4, neginf=-np.finfo(float).max / 4)
