"""Privacy spent by a run, for its summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdl.privacy.accounting import events_of

if TYPE_CHECKING:
    from fdl.participants import Client, Server


def privacy_spent(server: Server, clients: Sequence[Client], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the (ε, δ) of a run.

    Args:
        server: holds the mechanisms of its own releases, and the policy.
        clients: all clients of the run.
        history: the records of all rounds; may be empty.

    Returns:
        ``epsilon``, the largest of all clients, infinite if anything was sent without noise or privacy is not
        accounted for. With a policy also ``level`` (the protected unit), ``delta``, ``accountant``, ``limit`` (the
        budget, or None), ``clients`` (ε by id) and ``noise`` (``"recipe"`` if noise was drawn from the recipe's seed,
        which allows anyone who knows the seed to remove it, else ``"secret"``).
    """
    policy = server.privacy
    if policy is None:
        return {"epsilon": math.inf}
    known = history[-1].get("privacy", {}) if history else {}
    uploaded = {client for record in history for client in record["clients"]}
    common = events_of(server)  # the server's releases were computed from all clients' data

    def of(client: Any) -> float:
        id = str(client.id)
        if id not in uploaded:
            return policy.spent(common)
        if id not in known:
            return policy.spent(common) if common or client.dp_sgd is not None else math.inf
        if not common:
            return known[id]
        own = events_of(client)  # complete only if one process holds all clients
        return policy.spent([*own, *common]) if own else math.inf

    epsilons = {str(client.id): of(client) for client in clients}
    return {
        "epsilon": max(epsilons.values()),
        "level": policy.level,
        "delta": policy.delta,
        "accountant": policy.accountant,
        "limit": policy.epsilon,
        "clients": epsilons,
        "noise": "secret" if server.has_noise_seed else "recipe",
    }
