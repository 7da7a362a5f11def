"""What a run has spent, for its summary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fdl.privacy.accounting import events_of

if TYPE_CHECKING:
    from fdl.federation.state import Federation


def spent(loop: Federation) -> dict[str, Any]:
    """The ε(δ) of a run.

    Args:
        loop: with at least one round, or none.

    Returns:
        ``epsilon``, the largest of all clients, infinite where anything went without noise or nobody kept account.
        With an account ``level`` (what it protects), ``delta``, ``accountant``, ``limit`` (the budget, or None) and
        ``clients`` (ε by id) and ``noise`` (``"recipe"`` where noise was drawn from the recipe's seed, so that whoever
        knows it can take the noise off, else ``"secret"``).
    """
    policy = loop.server.privacy
    if policy is None:
        return {"epsilon": math.inf}
    known = loop.history[-1].get("privacy", {}) if loop.history else {}
    heard = {client for record in loop.history for client in record["clients"]}
    common = events_of(loop.server)  # what the server released was made of all clients' data

    def of(client: Any) -> float:
        id = str(client.id)
        if id not in heard:
            return policy.spent(common)
        if id not in known:
            return policy.spent(common) if common or client.dp_sgd is not None else math.inf
        if not common:
            return known[id]
        own = events_of(client)  # only here where one process has all clients
        return policy.spent([*own, *common]) if own else math.inf

    clients = {str(client.id): of(client) for client in loop.clients}
    return {
        "epsilon": max(clients.values()),
        "level": policy.level,
        "delta": policy.delta,
        "accountant": policy.accountant,
        "limit": policy.epsilon,
        "clients": clients,
        "noise": "secret" if loop.server.has_noise_seed else "recipe",
    }
