"""Privacy accounting: the mechanisms applied to a participant's data, and the (ε, δ) that they compose to.

A participant keeps its account in ``state["privacy"]["events"]``, so that checkpoints carry it. An event is a dict of

- ``mechanism``: what was run, e.g. ``"dp_sgd"``, ``"gaussian"``, ``"gnmax"``; for people, sums do not look at it;
- ``level``: what may change without being noticed: one ``"example"``, or all that one ``"institution"`` contributes;
- ``noise_multiplier``: standard deviation of the noise over the L2 sensitivity, 0 where there is no noise;
- ``sampling_probability``: chance with which an example takes part in a step (Poisson sampling), 1 without sampling;
- ``count``: how often.

Every mechanism is noted as the Gaussian one that bounds it, e.g. a noisy arg max of votes (GNMax, Papernot et al.,
2018), which is (α, α/σ²)-RDP an answer, as a Gaussian mechanism with noise multiplier σ/√2. Noise at the level of an
institution has to cover that its contribution is replaced by another: then it covers a change of one example, too.
Neighbours at the level of examples differ by one example more or less.

Where a recipe has a `privacy` section, participants carry its `Policy`: then `spend` notes ε as a metric of the round,
and `affords` tells whether a budget has room for more.

Steps and rounds are composed by ``dp_accounting``: Rényi differential privacy (Mironov, 2017) or privacy loss
distributions (Koskela et al., 2020; Gopi et al., 2021), which are tighter. Both are upper bounds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fdl.errors import UserError
from fdl.utils.libraries import library

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Accountant = Literal["pld", "rdp"]
Level = Literal["example", "institution"]

LEVELS: tuple[Level, ...] = ("example", "institution")

_GRID = 1e-4
"""Width of the bins of privacy loss, `dp_accounting`'s own. Wider ones are faster and give larger ε."""

_LOST = 1e-3
"""Share of ε that wider bins may cost in a search; they cost about 0.6 times their squared width a step."""


@dataclass(frozen=True)
class Policy:
    """Privacy policy: the budget and accountant of a run.

    Args:
        delta: δ of every ε.
        epsilon: what may be spent, None for no limit.
        accountant: how events are composed.
        level: what the limit is for.
    """

    delta: float
    epsilon: float | None = None
    accountant: Accountant = "pld"
    level: Level = "example"

    def spent(self, events: Sequence[Mapping[str, Any]], level: Level | None = None) -> float:
        """ε of an account that holds all that was done; nothing was spent where nothing was done."""
        return epsilon(events, self.delta, self.accountant, level or self.level) if events else 0.0


def event(
    mechanism: str,
    noise_multiplier: float,
    sampling_probability: float = 1.0,
    count: int = 1,
    level: Level = "example",
) -> dict[str, Any]:
    """One entry of an account; arguments as in the module's text.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> step = event("gaussian", noise_multiplier=2.0, sampling_probability=0.01, count=100)
        >>> step["noise_multiplier"], step["level"]
        (2.0, 'example')
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    if not (noise_multiplier >= 0 and 0 < sampling_probability <= 1 and count >= 0):
        raise ValueError(
            f"{mechanism}: need noise_multiplier ≥ 0, sampling_probability in (0, 1] and count ≥ 0, got "
            f"{noise_multiplier}, {sampling_probability} and {count}"
        )
    return {
        "mechanism": mechanism,
        "level": level,
        "noise_multiplier": float(noise_multiplier),
        "sampling_probability": float(sampling_probability),
        "count": int(count),
    }


class HasAccount(Protocol):
    """Owner of a privacy account: a client, or the server.

    Attributes:
        state: what survives a restart; the account is a part of it.
        metrics: what happened in the current round.
        privacy: what the account is held against, None where nothing is.
    """

    state: dict[str, Any]
    metrics: dict[str, float]
    privacy: Any


def spend(participant: HasAccount, event: Mapping[str, Any]) -> None:
    """Note that a mechanism is run on a participant's data; one equal to the last is added to its count.

    Under a policy ε becomes a metric of the round: ``privacy/epsilon``, and ``privacy/institution_epsilon`` where there
    is a bound for institutions.

    Args:
        participant: whose data.
        event: as the module's text says.
    """
    account = participant.state.setdefault("privacy", {}).setdefault("events", [])
    if account and {**account[-1], "count": 0} == {**event, "count": 0}:
        account[-1]["count"] += event["count"]
    else:
        account.append(dict(event))
    policy = getattr(participant, "privacy", None)
    if policy is not None:
        for level, name in zip(LEVELS, ("privacy/epsilon", "privacy/institution_epsilon")):
            spent = policy.spent(account, level)
            if level == "example" or spent < math.inf:
                participant.metrics[name] = spent


def affords(participant: HasAccount, event: Mapping[str, Any]) -> bool:
    """Return True if a participant's budget allows one more event; always True without a budget.

    Args:
        participant: whose data.
        event: that has not been noted yet.
    """
    policy = getattr(participant, "privacy", None)
    if policy is None or policy.epsilon is None:
        return True
    return policy.spent([*events_of(participant), event]) <= policy.epsilon * (1 + 1e-9)


def events_of(participant: HasAccount) -> list[dict[str, Any]]:
    """A participant's account so far."""
    return participant.state.get("privacy", {}).get("events", [])


def epsilon(
    events: Sequence[Mapping[str, Any]],
    delta: float,
    accountant: Accountant = "pld",
    level: Level = "example",
) -> float:
    """Return the ε that all events compose to.

    Args:
        events: an account.
        delta: the chance in which ε may be exceeded, in (0, 1).
        accountant: how they are composed.
        level: what the bound is for. What protects an institution protects each of its examples; noise that hides an
            example says nothing of an institution.

    Returns:
        ε; infinite where nothing was noted, where anything went without noise, or where a level is not covered.

    Example:
        >>> epsilon([], delta=1e-5)  # nothing noted: no bound
        inf
        >>> steps = event("gaussian", noise_multiplier=1.0, sampling_probability=0.01, count=1000)
        >>> print(f"{epsilon([steps], delta=1e-5, accountant='rdp'):.1f}")
        2.1
    """
    _delta(delta)
    if not events or any(one["noise_multiplier"] == 0 for one in events if one["count"]):
        return math.inf
    if level == "institution" and any(one["level"] != "institution" for one in events):
        return math.inf
    counts: dict[tuple[float, float], int] = {}  # order does not matter to a sum
    for one in events:
        key = one["noise_multiplier"], one["sampling_probability"]
        counts[key] = counts.get(key, 0) + one["count"]
    steps = tuple(sorted((*key, count) for key, count in counts.items() if count and not math.isinf(key[0])))
    return _epsilon(steps, delta, accountant) if steps else 0.0


def solve_noise(
    epsilon: float, delta: float, sampling_probability: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """The least noise with which that many steps stay within a budget, to 0.1 %, never below it.

    Args:
        epsilon: the budget, > 0.
        delta: its δ, in (0, 1).
        sampling_probability: chance with which an example takes part in a step, in (0, 1].
        steps: how many, ≥ 1.
        accountant: how they are composed.

    Raises:
        UserError: no amount of noise that numbers can hold does, or the budget asks for next to none.
    """
    return _solve(float(epsilon), float(delta), float(sampling_probability), int(steps), accountant)


@lru_cache(maxsize=4096)
def _solve(epsilon: float, delta: float, probability: float, steps: int, accountant: Accountant) -> float:
    import_accounting()
    from dp_accounting.mechanism_calibration import ExplicitBracketInterval, calibrate_dp_mechanism
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    _delta(delta)
    if not epsilon > 0:
        raise UserError(f"epsilon must be > 0, got {epsilon}")

    def search(make: Any, low: float, high: float) -> float:
        bracket = ExplicitBracketInterval(low, high)
        event = lambda noise: _sampled(noise, probability, steps)  # noqa: E731
        return calibrate_dp_mechanism(make, event, epsilon, delta, bracket, tol=1e-3 * high)

    with _quiet():
        # Rényi's bound is cheap and never below the other, so its solution ends the other's search from above
        low = high = 1.0
        while _epsilon(((high, probability, steps),), delta, "rdp") > epsilon:
            high *= 2
            if high > 1e9:
                raise UserError(f"no noise brings {steps} steps with δ = {delta:g} down to ε = {epsilon:g}")
        while _epsilon(((low, probability, steps),), delta, "rdp") <= epsilon:
            low /= 2
            if low < 0.1:
                raise UserError(f"ε = {epsilon:g} asks for next to no noise in {steps} step(s): it protects nothing")
        noise = search(RdpAccountant, low, high)
        if accountant == "rdp":
            return noise
        grid = min(max(math.sqrt(_LOST * epsilon / steps), _GRID), 10 * _GRID)
        make = lambda: PLDAccountant(value_discretization_interval=grid)  # noqa: E731
        low = noise / 2
        while make().compose(_sampled(low, probability, steps)).get_epsilon(delta) <= epsilon:
            low /= 2
        return search(make, low, noise * 1.01)


@lru_cache(maxsize=65536)
def _epsilon(steps: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    import_accounting()
    if accountant == "rdp":
        from dp_accounting.rdp import RdpAccountant

        composed = RdpAccountant()
        with _quiet():
            for noise, probability, count in steps:
                composed.compose(_sampled(noise, probability, count))
            return float(composed.get_epsilon(delta))
    parts = [_loss(noise, probability).self_compose(count) for noise, probability, count in steps]
    return float(reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _loss(noise: float, probability: float) -> Any:
    """The privacy loss of one step, which costs more than composing it; a few megabytes."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise, value_discretization_interval=_GRID, sampling_prob=probability)


def _sampled(noise: float, probability: float, count: int) -> DpEvent:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    step = GaussianDpEvent(noise)
    return SelfComposedDpEvent(step if probability == 1 else PoissonSampledDpEvent(probability, step), count)


def import_accounting() -> None:
    """Raise a UserError that names the extra where ``dp_accounting`` is not installed."""
    library("dp_accounting", "privacy", "privacy", has="dp_event")


def _delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta must be in (0, 1), got {delta}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back warnings of orders that are left out: the bound is the least over the others, and holds."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
