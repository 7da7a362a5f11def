"""How the clients of a round take their turns."""

from __future__ import annotations

import copy
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch

from fdl.engine.runtime import seed_everything
from fdl.engine.vectorized.fit import TOGETHER, FitRequest, NotVectorizableError
from fdl.engine.vectorized.stacked_models import SMALL, StackedModels, activations, unstackable
from fdl.errors import UserError, out_of_memory
from fdl.federation.suspended_turn import ClientTurn
from fdl.state.weights import count_parameters

if TYPE_CHECKING:
    from torch import nn

    from fdl.engine.runtime import Runtime
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client

log = logging.getLogger("fdl")

ClientDownload = tuple["Client", "Message | None"]

MEMORY = 1 << 30
"""Bytes that clients trained together may take on a CPU; on a GPU it is half of what is free."""


class Executor(ABC):
    """Runs `Method.local_update` for a cohort.

    Results must not depend on the order of turns: each turn begins with the client's own streams and its own state.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, method: Method, turns: Iterable[ClientDownload]) -> Iterator[ClientDownload]:
        """Yield every client with its upload, in the order of `turns`, which holds clients with their downloads."""


class Sequential(Executor):
    """One client after another in this process."""

    name = "sequential"

    def __call__(self, method: Method, turns: Iterable[ClientDownload]) -> Iterator[ClientDownload]:
        """Yield every client with its upload, in the order of `turns`."""
        for client, download in turns:
            seed_everything(client.seed, "client", client.round, client.id)
            try:
                with client.turn():
                    upload = method.local_update(client, download)
            except Exception as error:
                _tell(error, [client])
            yield client, upload


class Batched(Executor):
    """Clients of one architecture train in one pass, their weights side by side.

    Every client's turn runs until it needs a fit, or an answer to the proxy set; when all have come so far, those who
    want the same of the same architecture are served together (`fdl.engine.vectorized.fit`), and the turns go on.
    Results are those of `Sequential` up to rounding. What cannot be done together is done one by one, and a line of the
    log says why.

    Args:
        memory: bytes that the clients of one group may take; by default as `MEMORY` says. A larger cohort is cut into
            groups, which come one after the other.
    """

    name = "vectorized"

    def __init__(self, memory: int | None = None):
        self._memory = memory
        self._stacks: dict[str, StackedModels] = {}
        self._costs: dict[str, int | None] = {}  # bytes a client takes, None where it cannot share a pass
        self._taken: dict[str, int] = {}
        self._common: set[str] = set()  # architectures that clients fill which are not their own
        self._apart: set[Any] = set()

    def __call__(self, method: Method, turns: Iterable[ClientDownload]) -> Iterator[ClientDownload]:
        """Yield every client with its upload, in the order of `turns`."""
        for group in self._groups(turns):
            yield from Sequential()(method, group) if len(group) == 1 else self._together(method, group)

    def against(self, module: nn.Module, runtime: Runtime) -> str | None:
        """Why clients with such a model do not train together; None if they do."""
        if runtime.sharder is not None:
            return "every rank has a part of each model"
        if runtime.fabric.strategy.precision.precision != "32-true":
            return "only 32-bit training is done together"
        return unstackable(module)

    def _groups(self, turns: Iterable[ClientDownload]) -> Iterator[list[ClientDownload]]:
        """Cut a cohort into as many clients at a time as memory allows."""
        group: list[ClientDownload] = []
        used = 0
        for client, download in turns:
            own = {client.architecture, *self._common}
            need = sum(self._cost(client, architecture) or 0 for architecture in own)
            if group and used + need > self._limit(client.runtime):
                yield group
                group, used = [], 0
            group.append((client, download))
            used += need
        if group:
            yield group

    def _together(self, method: Method, group: Sequence[ClientDownload]) -> Iterator[ClientDownload]:
        clients = [client for client, _ in group]
        self._taken = {}
        seats = [ClientTurn(method, client, download, lambda *a: self._row(clients, *a)) for client, download in group]
        try:
            # who trains longest comes first: fits then work on the first rows of a stack, without moving any
            waiting = sorted(seats, key=lambda seat: -seat.client.samples)
            while waiting:
                for seat in waiting:
                    seat.go_on()
                    if seat.job is None and seat.alone:  # its upload may lie in a module that others borrow next
                        seat.upload = copy.deepcopy(seat.upload)
                for seat in seats:
                    if seat.error is not None:
                        _tell(seat.error, [seat.client])
                waiting = [seat for seat in waiting if seat.job is not None]
                self._serve(waiting)
            for seat in seats:
                yield seat.client, seat.upload
        finally:
            for seat in seats:
                seat.leave()

    def _serve(self, waiting: Sequence[ClientTurn]) -> None:
        """Do what turns wait for, together where more than one waits for the same."""
        groups: list[list[ClientTurn]] = []
        for seat in waiting:
            same = next((group for group in groups if group[0].job.alike(seat.job)), None)
            if same is None:
                groups.append([seat])
            else:
                same.append(seat)
        for group in groups:
            job, client = group[0].job, group[0].client
            key = id(job.stack), type(job), _named(job.objective if isinstance(job, FitRequest) else job.what)
            if len(group) == 1 or key in self._apart:
                continue
            try:
                answers = TOGETHER[type(job)](client.runtime, [seat.job for seat in group])
            except NotVectorizableError as reason:
                self._apart.add(key)
                what = "train" if isinstance(job, FitRequest) else "are asked"
                log.info("clients with %s %s one after another: %s", client.architecture, what, reason)
                continue
            except Exception as error:
                _tell(error, [seat.client for seat in group])
            for seat, answer in zip(group, answers):
                seat.answer = answer

    def _row(self, clients: Sequence[Client], client: Client, architecture: str) -> tuple[StackedModels, int] | None:
        """A place for a client's model among those of one architecture, None where there is none."""
        cost = self._cost(client, architecture)
        if cost is None:
            return None
        row = self._taken.get(architecture, 0)
        stack = self._stacks.get(architecture)
        if row == 0:
            count = sum(other.architecture == architecture for other in clients)
            if architecture != client.architecture:
                self._common.add(architecture)
                count = len(clients)
            count = min(count, max(self._limit(client.runtime) // cost, 1))
            if stack is None or len(stack.modules) < count:
                stack = self._stacks[architecture] = StackedModels(_runtime(client).shared_module(architecture), count)
        if row == len(stack.modules):  # more than expected
            return None
        self._taken[architecture] = row + 1
        return stack, row

    def _cost(self, client: Client, architecture: str) -> int | None:
        """Bytes that one more client takes: weights, gradients, two moments, a copy, and what a step keeps."""
        if architecture not in self._costs:
            runtime = _runtime(client)
            module = runtime.shared_module(architecture)
            reason = self.against(module, runtime)
            if reason is not None:
                self._costs[architecture] = None
                if reason:
                    log.info("clients with %s train one after another: %s", architecture, reason)
            else:
                size = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
                self._costs[architecture] = 5 * size + activations(
                    module, client.train, client.local_training.batch_size
                )
        return self._costs[architecture]

    def _limit(self, runtime: Runtime) -> int:
        if self._memory is None:
            cuda = runtime.device.type == "cuda"
            self._memory = torch.cuda.mem_get_info(runtime.device)[0] // 2 if cuda else MEMORY
        return self._memory


class Auto(Batched):
    """As `Batched` for models that are `SMALL`, as `Sequential` for all others."""

    name = "auto"

    def against(self, module: nn.Module, runtime: Runtime) -> str | None:
        """Why clients with such a model do not train together; None if they do."""
        if count_parameters(module) > SMALL.get(runtime.device.type, 0):
            return ""  # nothing to tell: nobody asked for it
        return super().against(module, runtime)


def _runtime(client: Client) -> Runtime:
    """What all clients share, also while the client sits at its own."""
    return client.runtime._runtime if isinstance(client.runtime, ClientTurn) else client.runtime


def _named(question: Any) -> Any:
    """What is the same for a function of one kind in all rounds."""
    return question if isinstance(question, str) else getattr(question, "__qualname__", type(question).__qualname__)


def _tell(error: BaseException, clients: Sequence[Client]) -> NoReturn:
    """Raise an error so that it says whose it is."""
    first = clients[0]
    who = f"client {first.id}" if len(clients) == 1 else "clients " + ", ".join(str(client.id) for client in clients)
    who += f" ({first.architecture}) in round {first.round}"
    if isinstance(error, UserError):
        raise UserError(f"{who}: {error}") from error
    hint = "local_training.batch_size or evaluation.batch_size, or give it a smaller model"
    if (known := out_of_memory(error, who, hint)) is not None:
        raise known from error
    if sys.version_info >= (3, 11):
        error.add_note(f"while {who} took its turn")
    raise error


EXECUTORS: dict[str, type[Executor]] = {executor.name: executor for executor in (Sequential, Batched, Auto)}
