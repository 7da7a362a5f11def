"""Executors: how the local updates of a cohort are run."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import isgeneratorfunction
from typing import TYPE_CHECKING, Any, ClassVar

from fdl.engine.requests import FitRequest
from fdl.engine.runtime import seed_everything
from fdl.engine.vectorized.fit import TOGETHER, NotVectorizableError, StackedFit, StackedPredict
from fdl.engine.vectorized.stacked_models import SMALL, unstackable
from fdl.federation.client_stacks import ClientModules, ClientStacks, NotVectorized
from fdl.federation.local_turns import LocalTurn, raise_for_client, run_local_update
from fdl.state.weights import count_parameters
from fdl.utils.seeding import GlobalStreams

if TYPE_CHECKING:
    from torch import nn

    from fdl.engine.runtime import Runtime
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client

log = logging.getLogger("fdl")

ClientDownload = tuple["Client", "Message | None"]


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
            _prepare(client)
            try:
                upload = run_local_update(method, client, download)
            except Exception as error:
                raise_for_client(error, [client])
            yield client, upload


class Vectorized(Executor):
    """Clients of one architecture train in one pass, their weights side by side.

    Every client's local update runs until it yields a request; when all have come so far, requests of one kind for the
    same architecture are computed in one pass (`fdl.engine.vectorized.fit`), and the local updates go on. Results are
    those of `Sequential` up to rounding. What cannot be done together is done one by one, and a line of the log says
    why.

    Args:
        memory: bytes that the clients of one group may take; by default as `fdl.federation.client_stacks.MEMORY` says.
            A larger cohort is cut into groups, which come one after the other.
    """

    name = "vectorized"

    def __init__(self, memory: int | None = None):
        self.stacks = ClientStacks(self.reason_not_vectorized, memory)
        self._one_by_one: set[Any] = set()  # kinds of requests that could not be vectorised
        self._plain: set[type] = set()  # methods that compute at once, of which the log has told

    def __call__(self, method: Method, turns: Iterable[ClientDownload]) -> Iterator[ClientDownload]:
        """Yield every client with its upload, in the order of `turns`."""
        for group in self._groups(turns):
            yield from Sequential()(method, group) if len(group) == 1 else self._run_group(method, group)

    def reason_not_vectorized(self, module: nn.Module, runtime: Runtime) -> NotVectorized | None:
        """The reason why clients with such a model do not train together; None if they do."""
        if runtime.sharder is not None:
            return NotVectorized("every rank has a part of each model")
        if runtime.fabric.strategy.precision.precision != "32-true":
            return NotVectorized("only 32-bit training is done together")
        reason = unstackable(module)
        return None if reason is None else NotVectorized(reason)

    def _groups(self, turns: Iterable[ClientDownload]) -> Iterator[list[ClientDownload]]:
        """Cut a cohort into as many clients at a time as memory allows."""
        group: list[ClientDownload] = []
        used = 0
        for client, download in turns:
            need = self.stacks.need(client)
            if group and used + need > self.stacks.limit(client.runtime):
                yield group
                group, used = [], 0
            group.append((client, download))
            used += need
        if group:
            yield group

    def _run_group(self, method: Method, group: Sequence[ClientDownload]) -> Iterator[ClientDownload]:
        self.stacks.begin([client for client, _ in group])
        turns = [_StackedTurn(method, *one, ClientModules(one[0], self.stacks)) for one in group]
        with ExitStack() as cleanup:
            for turn in turns:
                cleanup.callback(turn.cancel)
            # who trains longest comes first: fits then work on the first rows of a stack, without moving any
            running = sorted(turns, key=lambda turn: -turn.client.samples)
            while running:
                for turn in running:
                    turn.advance()
                self._log_plain(turns)
                running = [turn for turn in running if turn.request is not None]
                self._run_requests(running)
            for turn in turns:
                yield turn.client, turn.upload

    def _run_requests(self, waiting: Sequence[_StackedTurn]) -> None:
        """Compute what turns wait for, together where more than one waits for the same."""
        groups: list[list[_StackedTurn]] = []
        for turn in waiting:
            same = next((group for group in groups if group[0].job.alike(turn.job)), None)
            if same is None:
                groups.append([turn])
            else:
                same.append(turn)
        for group in groups:
            job, client = group[0].job, group[0].client
            trains = isinstance(job, StackedFit)
            kind = id(job.stack), type(job), _kind(job.objective if trains else job.what)
            if len(group) == 1 or kind in self._one_by_one:
                continue
            try:
                results = TOGETHER[type(job)](client.runtime, [turn.job for turn in group])
            except NotVectorizableError as reason:
                self._one_by_one.add(kind)
                what = "train" if trains else "predict"
                log.info("clients with %s %s one after another: %s", client.architecture, what, reason)
                continue
            except Exception as error:
                raise_for_client(error, [turn.client for turn in group])
            for turn, result in zip(group, results):
                turn.deliver(result)

    def _log_plain(self, turns: Sequence[_StackedTurn]) -> None:
        """Note once that a method's clients could train together, if only it yielded its fits."""
        kind = type(turns[0].method)
        if kind not in self._plain and any(turn.modules.any_row and not turn.is_generator for turn in turns):
            self._plain.add(kind)
            log.info("clients of %s train one after another: %s", kind.name, not_a_generator(kind))


class Auto(Vectorized):
    """As `Vectorized` for models that are `SMALL`, as `Sequential` for all others."""

    name = "auto"

    def reason_not_vectorized(self, module: nn.Module, runtime: Runtime) -> NotVectorized | None:
        """The reason why clients with such a model do not train together; None if they do."""
        if count_parameters(module) > SMALL.get(runtime.device.type, 0):
            return NotVectorized("a model of this size gains nothing", expected=True)
        return super().reason_not_vectorized(module, runtime)


def plain_function_note(executor: Executor, method: Method, clients: Sequence[Client]) -> str | None:
    """A line for `fdl check` where clients could train together, if only their method yielded its fits; else None.

    Args:
        executor: runs the local updates.
        method: whose `local_update` runs.
        clients: those of this process.
    """
    if not isinstance(executor, Vectorized) or len(clients) < 2 or isgeneratorfunction(method.local_update):
        return None
    if all(executor.stacks.cost(client, client.architecture) is None for client in clients):
        return None
    return f"clients train one after another: {not_a_generator(type(method))}"


def not_a_generator(method: type[Method]) -> str:
    """A clause that says how clients of a method could train together."""
    return f"{method.__qualname__}.local_update calls client.fit; `yield FitRequest(…)` lets several train in one pass"


class _StackedTurn(LocalTurn):
    """A local update that waits wherever its request can be computed together with others'.

    Args:
        method: whose `local_update` runs.
        client: whose turn it is.
        download: what the client was sent.
        modules: the client's own.

    Attributes:
        job: the request that it waits for, about its row of a stack.
    """

    def __init__(self, method: Method, client: Client, download: Message | None, modules: ClientModules):
        super().__init__(method, client, download)
        self.modules = modules
        self.job: StackedFit | StackedPredict | None = None
        self._started = self._delivered = False
        self._result: Any = None
        # dropout, and whatever else a method draws without a generator, comes from torch's global streams. Turns that
        # run between each other's requests must not see what others draw, so each has its own state of them.
        self._streams: GlobalStreams | None = None

    def deliver(self, result: Any) -> None:
        """Take the result of the job, with which `advance` resumes the turn."""
        self._result, self._delivered = result, True
        if isinstance(self.request, FitRequest):
            self.client.log_losses(self.request.name, result)

    def advance(self) -> None:
        """Run until there is a request that can be computed together with others', or to the end.

        A job whose result was not delivered is computed for this client alone.

        Raises:
            Exception: what the local update raises; it names the client.
        """
        with self._own_modules():
            try:
                if not self._started:
                    self._started = True
                    _prepare(self.client)
                    self.start()
                else:
                    self._streams.restore()
                    self._resume()
                while self.request is not None and (job := self.modules.stacked(self.request)) is None:
                    self.run_request()
            except Exception as error:
                raise_for_client(error, [self.client])
        if self.request is not None:
            self.job, self._streams = job, GlobalStreams.current()
        elif self.modules.shared:  # the upload may lie in a module that others fill
            self.upload = copy.deepcopy(self.upload)

    def cancel(self) -> None:
        """End it wherever it is; its ``finally`` blocks run."""
        with self._own_modules():
            super().cancel()

    def _resume(self) -> None:
        if self._delivered:
            self._delivered = False
            self.resume(self._result)
        else:
            self.run_request()

    @contextmanager
    def _own_modules(self) -> Iterator[None]:
        before, self.client.modules = self.client.modules, self.modules
        try:
            yield
        finally:
            self.client.modules = before


def _prepare(client: Client) -> None:
    """Let a turn begin with the client's own streams."""
    seed_everything(client.seed, "client", client.round, client.id)


def _kind(question: Any) -> Any:
    """Return a key that is the same for one kind of function in all rounds."""
    return question if isinstance(question, str) else getattr(question, "__qualname__", type(question).__qualname__)


EXECUTORS: dict[str, type[Executor]] = {executor.name: executor for executor in (Sequential, Vectorized, Auto)}
