"""From a recipe to models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fdl.encoders.base import Frozen
from fdl.engine.inference import map_tensors
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.knowledge.confidence.pairs import ImagesOfPairs
from fdl.modules.foreign import as_federated_module
from fdl.recipe.config import Recipe
from fdl.registry.component import Component
from fdl.registry.instantiate import instantiate
from fdl.registry.kinds import KINDS
from fdl.registry.targets import find
from fdl.utils.seeding import numpy_stream, stream_seed

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.base import FederatedDataModule
    from fdl.encoders.base import Encoder
    from fdl.methods.base import Method


def _architectures(recipe: Recipe, data: FederatedDataModule, runtime: Runtime) -> list[str]:
    """Register a factory for every architecture of the recipe; returns the specialists' keys in order."""
    for part, component in (("student", recipe.student), ("teacher", recipe.teacher)):
        if component is not None:
            runtime.factories[part] = _factory(component, part, data)
    keys: list[str] = []
    known = [(component.target, component.args) for component in recipe.specialists]
    for i, component in enumerate(recipe.specialists):
        if known[i] in known[:i]:  # the same architecture: one template serves both
            keys.append(keys[known.index(known[i])])
            continue
        model = component.args.get("model")  # timm's and torchvision's names say more; what follows a dot is a tag
        name = model.partition(".")[0] if isinstance(model, str) else component.target.rpartition(".")[2]
        key = f"{name}-{i}" if name in {"student", "teacher", *keys} else name
        runtime.factories[key] = _factory(component, f"specialists.{i}", data)
        keys.append(key)
    return keys


def assign(recipe: Recipe) -> list[int]:
    """Which of the recipe's specialists each client has.

    Clients that an entry of ``specialists`` names have that one. The others get those entries that name nobody, in
    turn, or drawn by weight from a stream that depends on the seed and the client alone.

    Args:
        recipe: the specialists and how they are assigned.

    Returns:
        The place of an entry of ``specialists`` for every client, by id.
    """
    named = {client: i for i, entry in enumerate(recipe.specialists) for client in entry.clients or ()}
    free = [i for i, entry in enumerate(recipe.specialists) if entry.clients is None]
    weights = np.array([recipe.specialists[i].weight for i in free])

    def entry(client: int) -> int:
        if client in named:
            return named[client]
        if recipe.federation.assignment == "in_turn":
            return free[client % len(free)]
        return free[numpy_stream(recipe.seed, "assignment", 0, client).choice(len(free), p=weights / weights.sum())]

    return [int(entry(client)) for client in range(recipe.federation.clients)]


def _model(part: str, purpose: str, method: Method, recipe: Recipe, runtime: Runtime) -> LightningModule | None:
    """The server's student or teacher, where the method needs one."""
    return runtime.create(part, stream_seed(recipe.seed, purpose)) if part in method.requires else None


def _factory(component: Component, key: str, data: FederatedDataModule) -> Callable[[], LightningModule]:
    """What builds one architecture for these data.

    Raises:
        UserError: when the recipe gives it another number of classes than the data have.
    """
    model_kwargs = data.model_kwargs
    given = component.args.get("num_classes", data.num_classes)
    if given != data.num_classes:
        raise UserError(f"{key}.args.num_classes: {given}, but the data have {data.num_classes} classes")
    found = find(component.target, KINDS["module"])
    parameters = found.signature.parameters if found.signature is not None else {}
    for name in KINDS["module"].injected:
        if name in parameters and parameters[name].required and name not in {*model_kwargs, *component.args}:
            raise UserError(f"{key}: {component.target} is no model for {data.task} data: those have no {name}")

    def example() -> Any:
        return map_tensors(data.train.batch(torch.zeros(2, dtype=torch.int64))[0], torch.zeros_like)

    return lambda: as_federated_module(instantiate(component, "module", key, **model_kwargs), key, example)


def _encoder(recipe: Recipe, data: FederatedDataModule, runtime: Runtime) -> Encoder | None:
    """The frozen public encoder, fitted on public data where it has to be."""
    if recipe.encoder is None:
        return None
    encoder = instantiate(recipe.encoder, "encoder", "encoder", **data.model_kwargs)
    if isinstance(encoder, Frozen):
        encoder.module = runtime.place(encoder.module)
    # of pairs, the images: they are what a public encoder knows
    encoder.fit(ImagesOfPairs(data.proxy) if data.task == "image_text" else data.proxy)
    return encoder
