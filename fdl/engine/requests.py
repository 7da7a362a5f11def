"""Computations that a client's local update leaves to whoever runs it, so that several clients' can run in one pass.

A generator yields requests and is sent their results; helpers that yield requests are called with ``yield from``::

    def local_update(self, client, download):
        module = client.load(download.tensors, "student")
        yield FitRequest(module, client.train, client.local_training)
        return Parameters(module_state(module), samples=client.reported_samples)
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from fdl.datamodules.samples import Samples
    from fdl.engine.inference import OutputSelector
    from fdl.modules.objectives import Objective
    from fdl.recipe.config import Fit

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class FitRequest:
    """A call of `Client.fit`; yielding it gives the mean over steps of every named loss.

    Args:
        module: the module to train, in place.
        samples: what to train on.
        config: epochs or steps, batch size, optimiser, schedule and clipping.
        objective: what to minimise; None for the module's own `training_step`.
        name: of the random stream, and of the losses among the client's metrics.
    """

    module: nn.Module
    samples: Samples
    config: Fit
    objective: Objective | None = None
    name: str = "fit"


@dataclass(frozen=True, eq=False)
class PredictRequest:
    """A call of `Client.predict`; yielding it gives a float32 tensor [n, …] on the CPU.

    Args:
        module: a module whose forward returns an `Output`.
        samples: n samples. Clients can share a pass only where they predict the same ones, e.g. the proxy set.
        what: the field of `Output` to collect, or a function of module and inputs.
    """

    module: nn.Module
    samples: Samples
    what: OutputSelector = "logits"


Requests: TypeAlias = Generator[FitRequest | PredictRequest, Any, T]
"""A generator that yields requests, is sent the result of each, and returns a T."""
