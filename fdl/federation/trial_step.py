"""Trial of every model before a run: one training step and one prediction, to report a broken model clearly."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from fdl.errors import UserError, explain_out_of_memory
from fdl.modules.checkpoints import one_line
from fdl.modules.foreign import ForeignModule
from fdl.participants import copy_of
from fdl.state.weights import load_into

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from fdl.datamodules.samples import Samples
    from fdl.federation.state import Federation
    from fdl.modules.types import Batch
    from fdl.recipe.config import Fit


def run_trial_steps(loop: Federation) -> None:
    """Train every architecture for one step on two samples and predict them; weights and random streams are restored.

    Args:
        loop: a freshly built loop.

    Raises:
        UserError: a model fails; the message names its key or client, its class, and the method that failed.
    """
    server, pooled, done = loop.server, "pooled" in loop.method.requires, set()
    for client in () if pooled else loop.clients:
        if client.architecture in done or client.samples < 2:
            continue
        done.add(client.architecture)
        with client.data_gate.open(), loop.runtime.borrow(client.architecture) as module:
            _run_trial(loop, f"client {client.id}", module, client.train, client.local_training, trains=True)
    for part, module in (("student", server.student), ("teacher", server.teacher)):
        if module is None or (part in done):
            continue
        sets = (server.pooled, server.proxy, server.public, server.validation, server.test)
        samples = next((some for some in sets if some is not None and len(some) > 1), None)
        if samples is not None:
            _run_trial(
                loop, part, module, samples, server.local_training if pooled else server.server_distil, trains=pooled
            )


def _run_trial(
    loop: Federation, who: str, module: LightningModule, samples: Samples, config: Fit, trains: bool
) -> None:
    """Run one step and one prediction; with `trains`, by the module's own training step, else by its forward alone."""
    own = module.label.partition(": ")[2] if isinstance(module, ForeignModule) else None
    label = own or f"{type(module).__module__}.{type(module).__qualname__}"
    some, step = samples.subset(torch.arange(2)), "training_step" if trains else "forward"
    once = dataclasses.replace(config, steps=1, epochs=None, batch_size=2, scheduler=None, compile="none")
    before, training = copy_of(module), module.training
    try:
        with (
            torch.random.fork_rng(devices=[]),
            explain_out_of_memory(f"{who}: {label}.{step}", "local_training.batch_size"),
        ):
            loop.runtime.fit(module, some, once, torch.Generator(), None if trains else _forward)
            step = "forward"
            logits = loop.runtime.predict(module, some)
    except UserError as error:
        raise UserError(f"{who}: {error}") from error
    except Exception as error:  # it may be the user's code: any error is reported in one sentence
        raise UserError(
            f"{who}: {label}.{step} fails on two samples: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        load_into(module, before)
        module.train(training)
    if loop.server.task == "classification" and tuple(logits.shape) != (2, loop.server.num_classes):
        raise UserError(
            f"{who}: {label}.forward returns, for two samples, logits of shape {list(logits.shape)}, expected "
            f"[2, {loop.server.num_classes}]"
        )


def _forward(module: LightningModule, batch: Batch) -> dict[str, Tensor]:
    """Compute an arbitrary loss of the logits, for a model that learns from others' predictions alone."""
    return {"loss": module(batch[0]).logits.float().square().mean()}
