"""Construction of DP training, accounting and noise from a recipe's privacy section."""

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
"""Name of the environment variable with a site's noise seed."""


_LEAST = 32
"""Minimum length of a noise seed in characters: 128 bits, written as hexadecimal digits."""


log = logging.getLogger("fdl")


def make_policy(recipe: Recipe) -> Policy | None:
    """Construct the privacy policy that every participant's account is compared with.

    Args:
        recipe: the checked recipe.

    Returns:
        The policy; None without a `privacy` section.

    Raises:
        UserError: ``dp_accounting`` is not installed.
    """
    settings = recipe.privacy
    if settings is None:
        return None
    import_accounting()
    level = "example" if settings.training == "dp_sgd" else "institution"
    return Policy(settings.delta, settings.epsilon, settings.accountant, level)


def read_noise_seed(recipe: Recipe) -> str | None:
    """Read the secret from which noise is drawn.

    It is the content of the file that `privacy.noise_seed` names, or else of the environment variable
    ``FDL_NOISE_SEED``. A recipe never contains it, since recipes are stored with runs and shared.

    Args:
        recipe: the checked recipe.

    Returns:
        The secret; None to draw noise from the recipe's seed, as in simulations.

    Raises:
        UserError: the recipe contains the secret itself, the file cannot be read or is readable by others than its
            owner, or the secret has fewer than 32 characters. The secret is never part of the message.
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


def make_dp_trainer(recipe: Recipe, policy: Policy | None) -> DPSGD | None:
    """Construct the clients' DP-SGD trainer.

    Args:
        recipe: the checked recipe.
        policy: the privacy policy; None without a `privacy` section.

    Returns:
        The trainer; None if clients train without noise.

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
        turns=planned_rounds(recipe),
        ghost=settings.ghost_clipping,
        chunk=settings.max_physical_batch,
    )


def make_executor(recipe: Recipe, dp_sgd: DPSGD | None) -> Executor:
    """Construct the executor of client updates; under DP-SGD always the sequential one.

    Args:
        recipe: the recipe, which names an executor.
        dp_sgd: the clients' DP-SGD trainer; None without.
    """
    if dp_sgd is None:
        return EXECUTORS[recipe.client_execution]()
    if recipe.client_execution != "sequential":
        log.info("clients train one after another: gradients are clipped example by example")
    return Sequential()


def privacy_callbacks(recipe: Recipe) -> list[Callback]:
    """Return the callbacks that the privacy section requires.

    Args:
        recipe: the checked recipe.
    """
    return [StopWhenSpent()] if recipe.privacy is not None and recipe.privacy.on_exhausted == "stop_run" else []


def planned_rounds(recipe: Recipe) -> Counter[int]:
    """Count the rounds in which each client is sampled and does not drop out, which do not depend on the data.

    Args:
        recipe: the checked recipe.

    Returns:
        Numbers of rounds by client id.
    """
    counts: Counter[int] = Counter()
    for round in range(1, recipe.federation.rounds + 1):
        asked, dropped = sample_cohort(recipe.federation, recipe.federation.clients, recipe.seed, round)
        counts.update(client for client in asked if client not in dropped)
    return counts
