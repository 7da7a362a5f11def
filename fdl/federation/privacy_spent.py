"""Privacy spent by a run, for its summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdl.privacy.accounting import events_of

if TYPE_CHECKING:
    from fdl.participants import Client, Server


def privacy_spent(server: Server, clients: Sequence[Client], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the (ε, δ) of a run.

    Args:
        server: holds the account of what it released, and the policy.
        clients: of the run.
        history: the records of all rounds; may be empty.

    Returns:
        ``epsilon``, the largest of all clients, infinite where anything went without noise or nobody kept account.
        With an account ``level`` (what it protects), ``delta``, ``accountant``, ``limit`` (the budget, or None) and
        ``clients`` (ε by id) and ``noise`` (``"recipe"`` where noise was drawn from the recipe's seed, so that whoever
        knows it can take the noise off, else ``"secret"``).
    """
    policy = server.privacy
    if policy is None:
        return {"epsilon": math.inf}
    known = history[-1].get("privacy", {}) if history else {}
    uploaded = {client for record in history for client in record["clients"]}
    common = events_of(server)  # what the server released was made of all clients' data

    def of(client: Any) -> float:
        id = str(client.id)
        if id not in uploaded:
            return policy.spent(common)
        if id not in known:
            return policy.spent(common) if common or client.dp_sgd is not None else math.inf
        if not common:
            return known[id]
        own = events_of(client)  # only here where one process has all clients
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
