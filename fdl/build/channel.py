"""Construction of the channel from a recipe: codecs, links, keys and faults."""

from __future__ import annotations

import math
from typing import Any

from fdl.comm import authentication
from fdl.comm.authentication import Authentication
from fdl.comm.bandwidth import Bandwidth
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.errors import UserError
from fdl.faults.base import Schedule
from fdl.faults.channel import FaultyChannel
from fdl.recipe.config import Recipe
from fdl.registry.component import Component
from fdl.registry.instantiate import instantiate


def make_channel(recipe: Recipe) -> Channel:
    """Construct the channel between the server and its clients, which injects faults if the recipe names some.

    Args:
        recipe: the checked recipe.

    Raises:
        UserError: a codec's stages do not form a chain, or the keys cannot be read.
    """
    settings: dict[str, Any] = {
        "upload": _codec(recipe.channel.upload, "channel.upload"),
        "download": _codec(recipe.channel.download, "channel.download"),
        "ledger": Ledger(),
        "seed": recipe.seed,
        "limit": recipe.channel.max_message_bytes,
        "bandwidth": Bandwidth(recipe.channel.bandwidth, recipe.channel.clients),
        "authentication": _authentication(recipe),
        "deadline": recipe.federation.deadline or math.inf,
    }
    faults = [instantiate(fault, "fault", f"faults.{i}") for i, fault in enumerate(recipe.faults)]
    return FaultyChannel(schedule=Schedule(faults, recipe.seed), **settings) if faults else Channel(**settings)


def _authentication(recipe: Recipe) -> Authentication | None:
    """Construct the authentication of messages; None if the recipe uses none."""
    path, clients = recipe.channel.keys, range(recipe.federation.clients)
    if not recipe.channel.authenticate and path is None:
        return None
    try:
        key = authentication.simulated_keys(recipe.seed) if path is None else authentication.read_keys(path, clients)
    except UserError as error:
        raise UserError(f"channel.keys: {error}") from error
    return Authentication(key, f"{recipe.name}/{recipe.seed}")


def _codec(stages: list[Component], key: str) -> Codec:
    return Codec([instantiate(stage, "codec", f"{key}.{i}") for i, stage in enumerate(stages)])
