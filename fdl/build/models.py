"""Construction of models and encoders from a recipe."""

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
        model = component.args.get("model")  # timm's and torchvision's names are clearer; a dot separates a tag
        name = model.partition(".")[0] if isinstance(model, str) else component.target.rpartition(".")[2]
        key = f"{name}-{i}" if name in {"student", "teacher", *keys} else name
        runtime.factories[key] = _factory(component, f"specialists.{i}", data)
        keys.append(key)
    return keys


def assign_specialists(recipe: Recipe) -> list[int]:
    """Assign one of the recipe's specialists to each client.

    Clients that an entry of ``specialists`` names get that entry. The others get the entries that name no clients, in
    turn, or drawn by weight from a random stream that depends only on the seed and the client.

    Args:
        recipe: the recipe, with the specialists and the rule of assignment.

    Returns:
        For every client, by id, the index of an entry of ``specialists``.
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
    """Create the server's student or teacher; None if the method needs none."""
    return runtime.create(part, stream_seed(recipe.seed, purpose)) if part in method.requires else None


def _factory(component: Component, key: str, data: FederatedDataModule) -> Callable[[], LightningModule]:
    """Return a factory of one architecture for these data.

    Raises:
        UserError: the recipe sets a number of classes other than that of the data, or the model does not fit the task.
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
    """Create the frozen public encoder, fitted on public data if it needs fitting."""
    if recipe.encoder is None:
        return None
    encoder = instantiate(recipe.encoder, "encoder", "encoder", **data.model_kwargs)
    if isinstance(encoder, Frozen):
        encoder.module = runtime.place(encoder.module)
    # a public encoder takes images only, so of pairs it gets the images
    encoder.fit(ImagesOfPairs(data.proxy) if data.task == "image_text" else data.proxy)
    return encoder
