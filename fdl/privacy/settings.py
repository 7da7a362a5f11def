"""What a recipe says of privacy, as the objects that act on it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from fdl.callbacks.base import Callback
from fdl.cohort import draw
from fdl.libraries import library
from fdl.privacy.accounting import Policy, import_accounting

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop
    from fdl.privacy.dp_sgd import DPSGD
    from fdl.recipe import Recipe


def policy(recipe: Recipe) -> Policy | None:
    """What every participant's account is held against; None without a `privacy` section.

    Raises:
        UserError: ``dp_accounting`` is not installed.
    """
    settings = recipe.privacy
    if settings is None:
        return None
    import_accounting()
    level = "example" if settings.training == "dp_sgd" else "institution"
    return Policy(settings.delta, settings.epsilon, settings.accountant, level)


def trainer(recipe: Recipe, policy: Policy | None) -> DPSGD | None:
    """How clients train with noise; None where they train without.

    Raises:
        UserError: ``opacus`` is not installed.
    """
    settings = recipe.privacy
    if policy is None or settings.training != "dp_sgd":
        return None
    library("opacus", "privacy", "privacy", has="PrivacyEngine")
    from fdl.privacy.dp_sgd import DPSGD

    return DPSGD(
        policy=policy,
        clip=settings.clip,
        noise_multiplier=settings.noise_multiplier,
        turns=turns(recipe),
        ghost=settings.ghost,
        chunk=settings.chunk,
    )


def watching(recipe: Recipe) -> list[Callback]:
    """What has to watch the run."""
    return [StopWhenSpent()] if recipe.privacy is not None and recipe.privacy.exhausted == "run" else []


class StopWhenSpent(Callback):
    """Ends a run after the round in which somebody's budget did not suffice."""

    def on_round_end(self, loop: FederatedLoop, record: dict[str, Any]) -> None:
        """Look for clients, or a server, that had to leave something out."""
        spent = [f"client {client}" for client, own in record["clients"].items() if own.get("privacy/exhausted")]
        spent += ["the server"] if record["metrics"].get("privacy/exhausted") else []
        if spent:
            loop.stop(f"the privacy budget of {', '.join(spent)} is spent")


def turns(recipe: Recipe) -> Counter[int]:
    """In how many rounds each client is asked and does not drop out; known in advance, whatever the data are."""
    counts: Counter[int] = Counter()
    for round in range(1, recipe.federation.rounds + 1):
        asked, dropped = draw(recipe.federation, recipe.federation.clients, recipe.seed, round)
        counts.update(client for client in asked if client not in dropped)
    return counts
