"""Clients that take their turns side by side: each runs until it needs a fit, and waits there for the others.

Every turn is a greenlet of its own: whoever resumes a turn goes on when that stops again. So nothing here happens at
the same time, and nothing depends on how anything is scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import greenlet
import torch
from torch import Tensor, nn

from fdl.engine.runtime import Runtime, seed_everything
from fdl.engine.vectorized.fit import FitRequest, PredictRequest
from fdl.modules.objectives import Objective, training_step
from fdl.state.weights import load_into

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.engine.inference import OutputSelector
    from fdl.engine.vectorized.stacked_models import StackedModels
    from fdl.messages import Message
    from fdl.methods.base import Method
    from fdl.participants import Client
    from fdl.recipe.config import Fit

Row = tuple["StackedModels", int]


class _Cancelled(BaseException):
    """The round is given up, and so is this turn."""


class _SuspendableTask:
    """A turn that can be put aside within its thread: changing over costs a tenth of what it costs between threads."""

    def start(self, task: Callable[[], None]) -> None:
        """Run a task until it waits or ends."""
        self._task = greenlet.greenlet(task)
        self.resume()

    def resume(self) -> None:
        """Let the task go on until it waits or ends."""
        self._caller = greenlet.getcurrent()
        self._task.parent = self._caller
        self._task.switch()

    def pause(self) -> None:
        """Called by the task: wait to be resumed."""
        self._caller.switch()


class ClientTurn:
    """One client's turn, and the runtime that it sees: its own copies of shared modules, and fits that wait for others.

    Args:
        method: what runs.
        client: whose turn it is.
        download: what it was sent.
        row: gives an architecture's stack and this client's row in it; None where there is none.

    Attributes:
        job: what it waits for; None when its turn is over.
        answer: what came of the job; None: it is left to do it alone.
        upload: what it has to say in the end.
        error: what ended its turn.
        alone: it has borrowed a module that others use, too, so it must not wait any more.
    """

    def __init__(
        self, method: Method, client: Client, download: Message | None, row: Callable[[Client, str], Row | None]
    ):
        self.method, self.client, self.download = method, client, download
        self.job: FitRequest | PredictRequest | None = None
        self.answer: Any = None
        self.upload: Message | None = None
        self.error: BaseException | None = None
        self.alone = False
        self._runtime: Runtime = client.runtime
        self._row, self._rows = row, {}
        self._worker: _SuspendableTask | None = None
        self._running = self._left = False
        self._streams: tuple[Tensor, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    # -- what the client sees of the runtime ---------------------------------------------------------------------

    @contextmanager
    def borrow(self, architecture: str, weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Within this context a module belongs to the client: a copy of its own, or the shared one if it has none.

        Args:
            architecture: a key of the runtime's `factories`.
            weights: what to fill it with; None leaves it as it is.
        """
        if architecture not in self._rows:
            self._rows[architecture] = self._row(self.client, architecture)
        found = self._rows[architecture]
        if found is None:
            self.alone = True
            with self._runtime.borrow(architecture, weights) as module:
                yield module
            return
        stack, row = found
        module = stack.modules[row]
        if weights is not None:
            load_into(module, weights)
        yield module

    def fit(
        self,
        module: nn.Module,
        samples: Samples,
        config: Fit,
        generator: torch.Generator,
        objective: Objective | None = None,
        round: int = 1,
        watch: Callable[[int], bool] | None = None,
    ) -> dict[str, float]:
        """As `Runtime.fit`, together with others where that can be; one that is watched trains by itself."""
        found = self._found(module) if watch is None else None
        if found is not None and len(samples) and config.epochs != 0 and config.steps != 0:
            stack, row = found
            if all(map(_asks, stack.trained(row))):
                before = generator.get_state()
                job = FitRequest(stack, row, samples, config, generator, objective or training_step, round)
                losses = self._wait(job)
                if losses is not None:
                    return losses
                generator.set_state(before)
        return self._runtime.fit(module, samples, config, generator, objective, round, watch)

    def predict(self, module: nn.Module, samples: Samples, what: OutputSelector = "logits") -> Tensor:
        """As `Runtime.predict`, together with others where all are asked about the same public samples."""
        found = self._found(module)
        if found is not None and samples is self.client.proxy and len(samples):
            answers = self._wait(PredictRequest(*found, samples, what))
            if answers is not None:
                return answers
        return self._runtime.predict(module, samples, what)

    def _found(self, module: nn.Module) -> Row | None:
        if self.alone or self._runtime.is_dry_run:
            return None
        rows = (found for found in self._rows.values() if found is not None)
        return next(((stack, row) for stack, row in rows if stack.modules[row] is module), None)

    def _wait(self, job: FitRequest | PredictRequest) -> Any:
        self.job, self.answer = job, None
        self._streams = _streams()
        self._worker.pause()
        if self._left:
            raise _Cancelled
        _set_streams(self._streams)
        return self.answer

    # -- what the executor sees ----------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Begin or resume the turn; comes back when it waits for a job or is over."""
        self.job, self._running = None, True
        if self._worker is None:
            self._worker = _SuspendableTask()
            self._worker.start(self._turn)
        else:
            self._worker.resume()
        self._stopped()

    def leave(self) -> None:
        """Give the turn up, wherever it is."""
        if self._running:  # whoever waited for it was interrupted
            self._stopped()
        if self.job is not None:
            self._left = True
            self.go_on()

    def _stopped(self) -> None:
        self._running = False
        if self.job is None and self._worker is not None:
            self._worker = None

    def _turn(self) -> None:
        client = self.client
        client.runtime = self
        try:
            if self._runtime.device.type == "cuda":
                torch.cuda.set_device(self._runtime.device)
            seed_everything(client.seed, "client", client.round, client.id)
            with client.turn():
                self.upload = self.method.local_update(client, self.download)
        except BaseException as error:  # for whoever resumed it
            self.error = error
        finally:
            self.job, client.runtime = None, self._runtime


_asks = attrgetter("requires_grad")


def _streams() -> tuple[Tensor, ...]:
    """The state of torch's global streams, which belong to whoever's turn it is."""
    cuda = torch.cuda.is_initialized()
    return torch.default_generator.get_state(), *((torch.cuda.get_rng_state(),) if cuda else ())


def _set_streams(states: tuple[Tensor, ...]) -> None:
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
