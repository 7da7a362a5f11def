"""From a recipe's privacy section to a trainer and an accountant."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fdl.callbacks.base import Callback
from fdl.callbacks.privacy_budget import StopWhenSpent
from fdl.errors import UserError
from fdl.federation.client_sampling import sample_cohort
from fdl.federation.executors import EXECUTORS, Executor, Sequential
from fdl.privacy.accounting import Policy, import_accounting
from fdl.utils.libraries import library

if TYPE_CHECKING:
    from fdl.privacy.dp_sgd import DPSGD
    from fdl.recipe.config import Recipe


NOISE_SEED = "FDL_NOISE_SEED"
"""The environment variable that may hold a site's noise seed."""


_LEAST = 32
"""Characters of a noise seed: 128 bits, written as hexadecimal digits."""


log = logging.getLogger("fdl")


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


def noise_seed(recipe: Recipe) -> str | None:
    """The secret from which noise is drawn; None where it is drawn from the recipe's seed, as in simulations.

    It is the text of the file that `privacy.noise_seed` names, else the environment's ``FDL_NOISE_SEED``. It never
    stands in a recipe, which is kept with the run and shared.

    Raises:
        UserError: the recipe gives it as a value, the file cannot be read or is not its owner's alone, or the secret
            has fewer than 32 characters. The secret is never part of the message.
    """
    named = None if recipe.privacy is None else recipe.privacy.noise_seed
    if named is None:
        secret, where = os.environ.get(NOISE_SEED), f"${NOISE_SEED}"
        return None if secret is None else _long_enough(secret, where)
    if not isinstance(named, Mapping) or list(named) != ["file"] or not isinstance(named["file"], str):
        raise UserError(
            "privacy.noise_seed: expected {file: PATH}; a secret must not stand in a recipe, which is kept with the run"
        )
    path = Path(named["file"])
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error.reason
        raise UserError(f"privacy.noise_seed: {path} cannot be read: {reason}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"privacy.noise_seed: others than its owner may read {path}; run chmod 600 {path}")
    return _long_enough(text, f"privacy.noise_seed: {path}")


def _long_enough(secret: str, where: str) -> str:
    secret = secret.strip()
    if len(secret) < _LEAST:
        raise UserError(
            f"{where}: a noise seed of at least {_LEAST} characters is needed, e.g. from openssl rand -hex 32"
        )
    return secret


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
        ghost=settings.ghost_clipping,
        chunk=settings.max_physical_batch,
    )


def executor(recipe: Recipe, dp_sgd: DPSGD | None) -> Executor:
    """How clients take their turns; under DP-SGD one by one, whatever the recipe says.

    Args:
        recipe: names an executor.
        dp_sgd: how clients train with noise, None without.
    """
    if dp_sgd is None:
        return EXECUTORS[recipe.client_execution]()
    if recipe.client_execution != "sequential":
        log.info("clients train one after another: gradients are clipped example by example")
    return Sequential()


def watching(recipe: Recipe) -> list[Callback]:
    """What has to watch the run."""
    return [StopWhenSpent()] if recipe.privacy is not None and recipe.privacy.on_exhausted == "stop_run" else []


def turns(recipe: Recipe) -> Counter[int]:
    """In how many rounds each client is asked and does not drop out; known in advance, whatever the data are."""
    counts: Counter[int] = Counter()
    for round in range(1, recipe.federation.rounds + 1):
        asked, dropped = sample_cohort(recipe.federation, recipe.federation.clients, recipe.seed, round)
        counts.update(client for client in asked if client not in dropped)
    return counts
