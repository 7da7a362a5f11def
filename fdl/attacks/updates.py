"""Gradients that a server can infer from the parameters that a client uploads."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fdl.datamodules.guarded import GuardedSamples
from fdl.errors import RejectedMessageError
from fdl.federation.executors import Sequential
from fdl.messages import Parameters, parts_of
from fdl.utils.seeding import stream_seed

if TYPE_CHECKING:
    from fdl.attacks.base import AttackTarget
    from fdl.datamodules.samples import Samples
    from fdl.modules.types import Batch
    from fdl.participants import Client, Server

_LR = 1e-3
"""Torch's default learning rate, for recipes that give none."""


@dataclass(frozen=True, eq=False)
class Update:
    """A client's local update as its server observes it.

    Attributes:
        model: the model before the local update; tensors that are not sent are the server's own.
        mean_gradient: (w_before − w_after) / (η · steps) of every trained tensor that is sent both ways, by name. For
            one step of plain SGD this is the gradient, up to the codecs' rounding.
        rows: rows of the client's training samples that were trained on, int64.
        steps: number of optimiser steps.
        plain_sgd: True if the optimiser was SGD without momentum and decay, at a constant rate and without noise.
    """

    model: nn.Module
    mean_gradient: dict[str, Tensor]
    rows: Tensor
    steps: int
    plain_sgd: bool


def observe_update(subject: AttackTarget, client: Client, first: bool) -> Update | None:
    """Repeat a client's local update in a copy, with the run's training, random streams and codecs.

    Args:
        subject: a finished run.
        client: one of its clients.
        first: True for the local update of round 1, from the run's initial model, as the client computed it if it was
            in the cohort; False for the one that would come next, from the last model.

    Returns:
        The observed update; None if the client receives or sends no parameters of a model that the server knows, or
        the channel rejects them.
    """
    server, channel = _server(subject, first), subject.loop.channel.fresh()
    twin = client.clone(None if first else copy.deepcopy(client.state))
    if not first:
        client.offload_state(changed=False)
        channel.load_state_dict(copy.deepcopy(subject.loop.channel.state_dict([client.id])))
    twin.start_round(server.round)
    watched = _record_rows(twin)
    try:
        with torch.random.fork_rng(devices=[]):
            message = subject.method.download(server, client.id)
            download = channel.download(message, client.id, server.round)
            ((_, upload),) = Sequential()(subject.method, [(twin, download)])
        received = channel.upload(upload, client.id, server.round)
    except RejectedMessageError:
        return None
    sent, received = parts_of(download).get(Parameters), parts_of(received).get(Parameters)
    if sent is None or received is None:
        return None
    before, after = dict(sent.tensors.items()), dict(received.tensors.items())
    known = [m for m in (server.student, subject.runtime.shared_module(client.architecture)) if m is not None]
    names, module = max(((_exchanged_names(m, before, after), m) for m in known), key=lambda pair: len(pair[0]))
    if not names:
        return None
    model = _with_tensors(module, before)
    own, config = dict(model.named_parameters()), client.local_training
    steps = config.steps
    if steps is None:
        steps = config.epochs * math.ceil(len(twin.train) / config.batch_size)
    args = config.optimizer.args
    rate = args.get("lr", _LR) * max(steps, 1)
    device = next(iter(own.values())).device
    moved = {n: (-after[n] if subject.method.uploads_are_deltas else before[n] - after[n]) for n in names}
    plain = config.optimizer.target == "sgd" and not args.keys() - {"lr"} and config.scheduler is None
    return Update(
        model=model,
        mean_gradient={name: (change.float() / rate).to(device) for name, change in moved.items()},
        rows=watched.rows(),
        steps=steps,
        plain_sgd=plain and client.dp_sgd is None and config.gradient_clip is None,
    )


def _server(subject: AttackTarget, first: bool) -> Server:
    """Copy the server as before the first round, or as after the last one."""
    server = subject.server.clone(None if first else copy.deepcopy(subject.server.state))
    if not first:
        server.start_round(subject.loop.round + 1)
        return server
    if server.student is not None:
        server.student = subject.runtime.create("student", stream_seed(subject.seed, "init"))
    server.start_round(1)
    subject.method.setup(server, subject.clients)
    return server


def _exchanged_names(module: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Return the names of a model's trained tensors that are sent both ways."""
    trained = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    return [
        name
        for name, shape in trained.items()
        if name in before and name in after and before[name].shape == after[name].shape == shape
    ]


@torch.no_grad()
def _with_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Copy a model in float32, and load the downloaded tensors into it."""
    model = copy.deepcopy(module).float()
    for name, own in model.state_dict().items():
        if name in tensors and own.shape == tensors[name].shape:
            own.copy_(tensors[name])
    return model


def _record_rows(client: Client) -> _TrackedSamples:
    """Record the rows of the samples that a client trains on."""
    tracked: list[_TrackedSamples] = []

    def track(samples: Samples) -> Samples:
        tracked.append(_TrackedSamples(samples))
        return tracked[0]

    train = client.train
    client.train = train.wrapped(track) if isinstance(train, GuardedSamples) else track(train)
    return tracked[0]


class _TrackedSamples:
    """Samples that record the rows that are trained on."""

    def __init__(self, samples: Samples):
        self._samples, self._used = samples, set()

    def __len__(self) -> int:
        return len(self._samples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._samples, name)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        if generator is not None:
            self._used.update(indices.tolist())
        return self._samples.batch(indices, generator)

    def rows(self) -> Tensor:
        """Return the rows trained on, int64; all rows if none were recorded."""
        return torch.tensor(sorted(self._used) or range(len(self)), dtype=torch.int64)
