"""Rows of weights that clients of one architecture train on side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from fdl.engine.requests import FitRequest, PredictRequest
from fdl.engine.vectorized.fit import StackedFit, StackedPredict
from fdl.engine.vectorized.stacked_models import StackedModels, activations
from fdl.modules.objectives import training_step
from fdl.state.weights import load_into

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor, nn

    from fdl.engine.runtime import Runtime
    from fdl.participants import Client

log = logging.getLogger("fdl")

MEMORY = 1 << 30
"""Bytes that clients trained together may take on a CPU; on a GPU it is half of what is free."""


@dataclass(frozen=True)
class NotVectorized:
    """Reason why clients of an architecture train one after another.

    Args:
        reason: a clause for the log.
        expected: the executor chose it by itself, so that nobody needs to be told.
    """

    reason: str
    expected: bool = False


class ClientStacks:
    """The stacks of all architectures, whose rows the clients of a group share out among them.

    Args:
        reason_not_vectorized: decides, given a module and the runtime, whether its clients can share a pass.
        memory: bytes that the clients of a group may take; None for what `MEMORY` says.

    Attributes:
        costs: bytes that one more client takes, by architecture; None where its clients cannot share a pass.
    """

    def __init__(self, reason_not_vectorized: Callable[[nn.Module, Runtime], NotVectorized | None], memory: int | None):
        self._reason, self._memory = reason_not_vectorized, memory
        self.costs: dict[str, int | None] = {}
        self._stacks: dict[str, StackedModels] = {}
        self._taken: dict[str, int] = {}
        self._common: set[str] = set()  # architectures that clients fill which are not their own
        self._group: Sequence[Client] = ()

    def begin(self, group: Sequence[Client]) -> None:
        """Free all rows for another group."""
        self._group, self._taken = group, {}

    def row(self, client: Client, architecture: str) -> tuple[StackedModels, int] | None:
        """A stack and the place in it for one more of a client's models; None where there is none."""
        cost = self.cost(client, architecture)
        if cost is None:
            return None
        row = self._taken.get(architecture, 0)
        stack = self._stacks.get(architecture)
        if row == 0:
            count = sum(other.architecture == architecture for other in self._group)
            if architecture != client.architecture:
                self._common.add(architecture)
                count = len(self._group)
            count = min(count, max(self.limit(client.runtime) // cost, 1))
            if stack is None or len(stack.modules) < count:
                stack = self._stacks[architecture] = StackedModels(client.runtime.shared_module(architecture), count)
        if row == len(stack.modules):  # more than expected
            return None
        self._taken[architecture] = row + 1
        return stack, row

    def need(self, client: Client) -> int:
        """Bytes that a client takes in a group."""
        return sum(self.cost(client, architecture) or 0 for architecture in {client.architecture, *self._common})

    def cost(self, client: Client, architecture: str) -> int | None:
        """Bytes that one more client takes: weights, gradients, two moments, a copy, and what a step keeps."""
        if architecture not in self.costs:
            module = client.runtime.shared_module(architecture)
            found = self._reason(module, client.runtime)
            if found is None:
                size = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
                kept = activations(module, client.train, client.local_training.batch_size)
                self.costs[architecture] = 5 * size + kept
            else:
                self.costs[architecture] = None
                level = logging.DEBUG if found.expected else logging.INFO
                log.log(level, "clients with %s train one after another: %s", architecture, found.reason)
        return self.costs[architecture]

    def limit(self, runtime: Runtime) -> int:
        """Bytes that the clients of a group may take."""
        if self._memory is None:
            cuda = runtime.device.type == "cuda"
            self._memory = torch.cuda.mem_get_info(runtime.device)[0] // 2 if cuda else MEMORY
        return self._memory


class ClientModules:
    """One client's own modules, which are rows of stacks; the runtime's shared module where there is no row.

    Args:
        client: whose they are.
        stacks: that the rows come from.

    Attributes:
        shared: it has borrowed a module of the runtime's, which other clients fill, too.
    """

    def __init__(self, client: Client, stacks: ClientStacks):
        self._client, self._stacks = client, stacks
        self._rows: dict[str, tuple[StackedModels, int] | None] = {}
        self.shared = False

    @property
    def any_row(self) -> bool:
        """True if it has been given a row."""
        return any(row is not None for row in self._rows.values())

    @contextmanager
    def borrow(self, architecture: str, weights: Mapping[str, Tensor] | None = None) -> Iterator[LightningModule]:
        """Lend this client's row of an architecture's stack for a block; the runtime's shared module without a row.

        Args:
            architecture: the architecture's key.
            weights: what to fill the module with; None leaves its weights as they are.
        """
        if architecture not in self._rows:
            self._rows[architecture] = self._stacks.row(self._client, architecture)
        found = self._rows[architecture]
        if found is None:
            self.shared = True
            with self._client.runtime.borrow(architecture, weights) as module:
                yield module
            return
        stack, row = found
        if weights is not None:
            load_into(stack.modules[row], weights)
        yield stack.modules[row]

    def stacked(self, request: FitRequest | PredictRequest) -> StackedFit | StackedPredict | None:
        """A request as one about a row of a stack, which can share a pass with others'; None where it cannot."""
        client, samples = self._client, request.samples
        found = None if self.shared or client.runtime.is_dry_run else self._find(request.module)
        if found is None or not len(samples):
            return None
        stack, row = found
        if isinstance(request, PredictRequest):
            return StackedPredict(stack, row, samples, request.what)
        config = request.config
        if config.epochs == 0 or config.steps == 0 or not all(map(attrgetter("requires_grad"), stack.trained(row))):
            return None
        objective, round = request.objective or training_step, max(client.round, 1)
        return StackedFit(stack, row, samples, config, client.rng(request.name), objective, round)

    def _find(self, module: nn.Module) -> tuple[StackedModels, int] | None:
        rows = (found for found in self._rows.values() if found is not None)
        return next(((stack, row) for stack, row in rows if stack.modules[row] is module), None)
