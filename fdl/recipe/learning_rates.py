"""Learning rates of single clients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdl.errors import UserError

if TYPE_CHECKING:
    from fdl.recipe.config import Fit, Recipe


def rates_by_client(given: Any) -> dict[int, float]:
    """Read a mapping of client ids to learning rates.

    Raises:
        UserError: it is none, or a rate is not above 0; the message begins with the key below ``federation``.

    Example:
        >>> rates_by_client({3: 0.01})
        {3: 0.01}
    """
    if not isinstance(given, Mapping):
        raise UserError(f"learning_rates: expected a mapping of client ids to learning rates, got {given!r:.80}")
    rates = {}
    for client, rate in given.items():
        if not str(client).isdecimal():
            raise UserError(f"learning_rates.{client}: expected the id of a client, a number from 0")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise UserError(f"learning_rates.{client}: expected a number above 0, got {rate!r:.80}")
        rates[int(client)] = float(rate)
    return rates


def local_fits(recipe: Recipe, entries: Sequence[int] | None) -> list[Fit]:
    """Return each client's settings of local training: ``local_training`` with its most specific learning rate.

    That is the client's own (``federation.learning_rates``), else that of its entry among ``specialists``, else the
    optimiser's.

    Args:
        recipe: says all that.
        entries: by client, which of the specialists it has; None where clients have none.

    Returns:
        By client.
    """
    own, made = rates_by_client(recipe.federation.learning_rates), {None: recipe.local_training}

    def fit(client: int) -> Fit:
        rate = own.get(client, None if entries is None else recipe.specialists[entries[client]].lr)
        if rate not in made:
            optimizer = recipe.local_training.optimizer
            optimizer = dataclasses.replace(optimizer, args={**optimizer.args, "lr": rate})
            made[rate] = dataclasses.replace(recipe.local_training, optimizer=optimizer)
        return made[rate]

    return [fit(client) for client in range(recipe.federation.clients)]


def alike_but_for_rates(a: Fit, b: Fit) -> bool:
    """Return True if two trainings differ in their learning rates at most."""
    return a is b or _without_rate(a) == _without_rate(b)


def _without_rate(fit: Fit) -> Fit:
    args = {name: value for name, value in fit.optimizer.args.items() if name != "lr"}
    return dataclasses.replace(fit, optimizer=dataclasses.replace(fit.optimizer, args=args))
