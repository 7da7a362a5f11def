"""Checks that every fit of a federation can run: its optimiser, its schedule, and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdl.engine.optimizers import build_fit_optimizer
from fdl.errors import UserError
from fdl.modules.optim import build_scheduler
from fdl.state.weights import trainable

if TYPE_CHECKING:
    from fdl.methods.base import Method
    from fdl.participants import Client, Server
    from fdl.recipe.config import Fit, Recipe

_Fits = Iterator[tuple[str, nn.Module, "Fit", int, str]]

SINGLE = "batch normalisation trains on two samples at least"


def check_fits(recipe: Recipe, method: Method, clients: Sequence[Client], server: Server) -> dict[int, str]:
    """Build the optimiser and schedule of every fit, and find sites too small for their models.

    Args:
        recipe: the checked recipe.
        method: the method, which determines the participants that train on private data.
        clients: all clients.
        server: the server, with the student.

    Returns:
        The clients to leave out under ``federation.too_small``: by id, the reason why it cannot train its model.

    Raises:
        UserError: an optimiser or schedule rejects its arguments, a schedule ends before its fit, a model cannot
            train on batches of one, or a site is too small and the recipe does not leave it out.
    """
    sharded = server.runtime.sharder is not None  # this process has only parts of the models
    for key, module, config, samples, who in () if sharded else _fits(recipe, method, clients, server):
        _check_optimizer(key, module, config, _steps(recipe, config, samples), who)
    if "pooled" in method.requires or server.arrival is not None:  # clients do not train; or their data change
        return {}
    _check_batches(clients)
    small = {
        client.id: f"it has one sample to train {client.architecture} on, and {SINGLE}"
        for client in clients
        if client.dp_sgd is None
        and client.samples == 1
        and 0 not in (client.local_training.steps, client.local_training.epochs)
        if _has_batch_norm(client.runtime.shared_module(client.architecture))
    }
    if small and recipe.federation.too_small == "refuse":
        client, reason = next(iter(small.items()))
        others = f" (so are {', '.join(map(str, list(small)[1:]))})" if len(small) > 1 else ""
        raise UserError(
            f"federation.too_small: client {client} is too small for its model{others}: {reason}; set "
            "federation.too_small=leave_out to run without such sites, take another partition or a model with group "
            "normalisation"
        )
    if len(small) == len(clients):
        raise UserError(f"federation.too_small: every client is too small for its model: {SINGLE}")
    return small


def _fits(recipe: Recipe, method: Method, clients: Sequence[Client], server: Server) -> _Fits:
    """Yield key, module, settings, number of samples and participant of every kind of fit that may occur."""
    if "pooled" in method.requires:
        for module in (server.student, server.teacher):
            if module is not None:
                yield (
                    "local_training",
                    module,
                    server.local_training,
                    sum(client.samples for client in clients),
                    "the server",
                )
    else:
        largest: dict[tuple[str, Fit], Client] = {}
        for client in clients:
            kind = client.architecture, client.local_training
            if kind not in largest or client.samples > largest[kind].samples:
                largest[kind] = client
        for client in largest.values():
            who, module = f"client {client.id}", client.runtime.shared_module(client.architecture)
            yield "local_training", module, client.local_training, client.samples, who
            if recipe.client_distil is not None:
                yield "client_distil", module, client.client_distil, len(server.proxy or ()), who
    if server.student is not None and server.proxy is not None and len(server.proxy):
        yield "server_distil", server.student, server.server_distil, len(server.proxy), "the server"


def _check_optimizer(key: str, module: nn.Module, config: Fit, steps: int, who: str) -> None:
    parameters = trainable(module)
    if not parameters or steps == 0:
        return
    try:
        optimizer = build_fit_optimizer(parameters, config)
    except UserError as error:
        raise UserError(f"{key}.optimizer: {error}") from error
    if config.scheduler is None:
        return
    try:
        scheduler = build_scheduler(optimizer, config.scheduler.target, config.scheduler.args)
    except UserError as error:
        raise UserError(f"{key}.scheduler: {error}") from error
    ends = getattr(scheduler, "total_steps", None)
    if isinstance(ends, int) and steps > ends:
        raise UserError(
            f"{key}.scheduler: {config.scheduler.target} ends after {ends} steps, and {who} takes {steps} (interval: "
            f"{config.scheduler.interval}); set {key}.scheduler.args.total_steps to {steps} at least"
        )


def _steps(recipe: Recipe, config: Fit, samples: int) -> int:
    """Count the steps of a fit's schedule, or of its optimiser if it has no schedule."""
    an_epoch = max(-(-samples // config.batch_size), 1)
    steps = config.steps if config.steps is not None else config.epochs * an_epoch
    if config.scheduler is None or steps == 0 or config.scheduler.interval == "step":
        return steps
    return steps // an_epoch if config.scheduler.interval == "epoch" else recipe.federation.rounds - 1


def _check_batches(clients: Sequence[Client]) -> None:
    """Reject batches of one for models whose batch normalisation would see a single value per channel."""
    tried: dict[str, bool] = {}
    for client in clients:
        if client.local_training.batch_size > 1 or client.dp_sgd is not None or client.samples == 0:
            continue
        if client.architecture not in tried:
            tried[client.architecture] = _accepts_batch_of_one(client)
        if not tried[client.architecture]:
            raise UserError(
                f"local_training.batch_size: 1, and client {client.id} trains {client.architecture}: {SINGLE}; set "
                "local_training.batch_size=2 or more, or take a model with group normalisation"
            )


def _accepts_batch_of_one(client: Client) -> bool:
    """Check if a model can train on a batch of one: its statistics may also be over positions of an image."""
    module = client.runtime.shared_module(client.architecture)
    if not _has_batch_norm(module):
        return True
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    inputs = client.train.batch(torch.arange(1))[0]
    training = module.training
    module.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), client.runtime.fabric.autocast():
            module(client.runtime.to_device((inputs,))[0])
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return False
    finally:
        module.train(training)
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
    return True


def _has_batch_norm(module: nn.Module) -> bool:
    """Check if a model is trainable and has batch normalisation."""
    return bool(trainable(module)) and any(isinstance(part, _BatchNorm) for part in module.modules())
