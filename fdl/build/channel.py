"""From a recipe to codecs and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdl.comm import authentication
from fdl.comm.authentication import Authentication
from fdl.comm.codec import Codec
from fdl.errors import UserError
from fdl.recipe.config import Recipe
from fdl.registry.component import Component
from fdl.registry.instantiate import instantiate

if TYPE_CHECKING:
    pass


def _authentication(recipe: Recipe) -> Authentication | None:
    """What makes and checks the messages' tags."""
    path, clients = recipe.channel.keys, range(recipe.federation.clients)
    if not recipe.channel.authenticate and path is None:
        return None
    try:
        key = authentication.simulated(recipe.seed) if path is None else authentication.read(path, clients)
    except UserError as error:
        raise UserError(f"channel.keys: {error}") from error
    return Authentication(key, f"{recipe.name}/{recipe.seed}")


def _codec(stages: list[Component], key: str) -> Codec:
    return Codec([instantiate(stage, "codec", f"{key}.{i}") for i, stage in enumerate(stages)])
