"""Client and server: private and public data, models, random streams and checkpointed state."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fdl.datamodules.arrivals import samples_at
from fdl.datamodules.guarded import GuardedSamples, PrivateDataGate, is_guarded
from fdl.engine.participant import Participant, PrivacyPolicy
from fdl.modules.objectives import Objective
from fdl.state import checkpoint
from fdl.state.offloaded_state import OffloadedState
from fdl.state.weights import load_into, module_state
from fdl.utils.seeding import stream_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from lightning import LightningModule
    from torch import Tensor

    from fdl.datamodules.arrivals import ScheduledSamples
    from fdl.datamodules.samples import Samples
    from fdl.messages import Message
    from fdl.recipe.config import Fit
    from fdl.state.client_store import DiskStore


__all__ = ["Client", "Participant", "PrivacyPolicy", "PrivateTrainer", "Server", "copy_of"]


class PrivateTrainer(Protocol):
    """What trains on private samples with noise."""

    def fit(
        self,
        client: Client,
        module: LightningModule,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
    ) -> dict[str, float]:
        """Train a client's module on private samples.

        Args:
            client: who trains, and whose account is charged.
            module: trained in place.
            samples: the client's own.
            config: for how long, on what batches, with which optimiser.
            objective: what is minimised; None: the module's own training step.
            name: of the training, which tells its random stream.

        Returns:
            Losses by name; empty where they would say more than the noise allows.
        """
        ...


class ModuleSource(Protocol):
    """Modules that a client can borrow and fill with weights; `Runtime` has those that all clients share."""

    def borrow(
        self, architecture: str, weights: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[LightningModule]:
        """Lend an architecture's module for a block.

        Args:
            architecture: the architecture's key.
            weights: what to fill it with; None leaves its weights as they are.
        """
        ...


class _Turn:
    """The shared modules that a client has borrowed for one turn.

    Attributes:
        stack: gives them back when the turn ends.
        borrowed: the modules by architecture.
        private: architectures whose module holds the client's own weights, as trained so far in this turn.
    """

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.borrowed: dict[str, LightningModule] = {}
        self.private: set[str] = set()


class Client(Participant):
    """An institution: private data that never leave it, and a specialist of its own architecture.

    Args:
        architecture: its key among the runtime's architectures: its specialist's, or the student's where the method
            lets all clients train that.
        train: private labelled samples to train on.
        calibration: private labelled samples held out from training, to calibrate confidence; may be empty.
        dp_sgd: trains on private samples with noise, and keeps them from all else; None trains without.
        store: where its state lies between its turns; None keeps it in memory.
        name: of the site whose data it has, for people; empty where it is only a number.
        participant: the arguments of `Participant`.

    Attributes:
        train: those that are there now.
        calibration: likewise.
        data_corruption: what an adversary makes of its samples, given them and whether they are for ``"train"`` or
            ``"calibration"``; None: nothing.
        corruption_start: the round from which it does.
        data_gate: whether private samples may be read, under `dp_sgd`.
        modules: the modules that it borrows: the runtime's, which all clients share, or its own while an executor
            trains several clients side by side.
    """

    def __init__(
        self,
        *,
        architecture: str,
        train: Samples | ScheduledSamples,
        calibration: Samples | ScheduledSamples,
        dp_sgd: PrivateTrainer | None = None,
        store: DiskStore | None = None,
        name: str = "",
        **participant: Any,
    ):
        self._storage = OffloadedState(store, participant["id"])
        self._modules: _Turn | None = None
        super().__init__(**participant)
        self.modules: ModuleSource = self.runtime
        self.dp_sgd, self.data_gate, self.name = dp_sgd, PrivateDataGate(), name
        self.architecture, self._train, self._calibration = architecture, train, calibration
        self.data_corruption: Callable[[Samples, str], Samples] | None = None
        self.corruption_start, self._corrupted = 1, False
        self.update_data()

    @property
    def state(self) -> dict[str, Any]:
        """The client's state, read from the store at the first access after `offload_state`."""
        return self._storage.value

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._storage.value = state

    @property
    def in_memory(self) -> bool:
        """True while the state is held in memory, False after `offload_state` with a store."""
        return self._storage.in_memory

    def offload_state(self, changed: bool = True) -> None:
        """Offload the client's state to disk, if a store is used; else make it what a checkpoint would give back.

        Args:
            changed: False if the state was only read.
        """
        if self._storage.offload(changed):
            self.cache.clear()

    def checkpoint_state(self) -> dict[str, Any]:
        """Offload the state and return what a checkpoint keeps of it: the state, or a reference to its file."""
        self.offload_state()
        return self._storage.to_checkpoint()

    def restore(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Go back to what `checkpoint_state` returned.

        Args:
            saved: the state, or the reference to its file.
            folder: where the files lie that a reference names.
        """
        self._storage.from_checkpoint(saved, folder)

    def clone(
        self,
        state: dict[str, Any] | None = None,
        train: Samples | ScheduledSamples | None = None,
        seed: int | None = None,
        honest: bool = False,
    ) -> Client:
        """Copy the client, for an experiment beside the run: same data, streams and settings, nothing in its cache.

        Args:
            state: the copy's own, in memory; None: empty.
            train: private samples in place of the client's; they pass the same corruption and the same gate.
            seed: root of its random streams; None: the client's.
            honest: leave an adversary's corruption of data out.
        """
        twin = copy.copy(self)
        twin._modules = None
        twin._storage, twin.state = OffloadedState(None, self.id), {} if state is None else state
        twin.cache, twin.metrics, twin._drawn = {}, {}, Counter()  # it draws what the client drew in this round
        twin.seed = self.seed if seed is None else seed
        if honest:
            twin.data_corruption, twin._corrupted = None, False
        if train is not None:
            twin._train = train
        if train is not None or honest:
            twin.update_data()
        return twin

    def start_round(self, round: int) -> None:
        """Start a round; from `corruption_start` on, an adversary's corrupted data take the place of its own."""
        super().start_round(round)
        corrupted = self.data_corruption is not None and round >= self.corruption_start
        if corrupted != self._corrupted:
            self._corrupted = corrupted
            self.update_data()

    def update_data(self) -> None:
        """Switch to the data of the current stage, and clear the cache of what was computed from others."""
        self.train, self.calibration = samples_at(self._train, self.stage), samples_at(self._calibration, self.stage)
        if self._corrupted:
            self.train = self.data_corruption(self.train, "train")
            self.calibration = self.data_corruption(self.calibration, "calibration")
        if self.dp_sgd is not None:
            self.train, self.calibration = (
                GuardedSamples(self.train, self.data_gate),
                GuardedSamples(self.calibration, self.data_gate),
            )
        self.cache.clear()

    def fit(
        self,
        module: LightningModule,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
        watch: Callable[[int], bool] | None = None,
    ) -> dict[str, float]:
        """Train a module as `Participant.fit` does; under DP-SGD with noise where samples are private.

        Args:
            module: trained in place.
            samples: private or public training samples.
            config: steps or epochs, batch size, optimiser and schedule.
            objective: loss to minimise; None: the module's own training step.
            name: of the training, in `metrics` and for its random stream.
            watch: called with the number of steps done; True ends the training. Not called under DP-SGD.

        Returns:
            Losses by name.
        """
        if self.dp_sgd is not None and is_guarded(samples):
            return self.dp_sgd.fit(self, module, samples, config, objective, name)
        return super().fit(module, samples, config, objective, name, watch)

    @property
    def samples(self) -> int:
        """How many private samples it trains on."""
        return len(self.train)

    @property
    def reported_samples(self) -> int:
        """How many it says it has, beside weights that are averaged by it: 1, as all do, where training is private."""
        return self.samples if self.dp_sgd is None else min(self.samples, 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within this context the client has a turn: the shared modules that it fills are its own until it ends.

        Raises:
            RuntimeError: it has one already.
        """
        if self._modules is not None:
            raise RuntimeError(f"client {self.id} has its turn already")
        self._modules = _Turn()
        try:
            with self._modules.stack:
                yield
        finally:
            self._modules = None

    def specialist(self) -> LightningModule:
        """Its private model, filled with its weights unless it is so since earlier in this turn.

        Raises:
            RuntimeError: outside of a `turn`.
        """
        module = self._borrow(self.architecture)
        if self.architecture not in self._modules.private:
            if "specialist" not in self.state:
                seed = stream_seed(self.seed, "init", 0, self.id)
                self.state["specialist"] = self.runtime.first_weights(self.architecture, seed)
            load_into(module, self.state["specialist"])
            self._modules.private.add(self.architecture)
        return module

    def save_specialist(self, module: LightningModule) -> None:
        """Store the specialist's weights until the next turn."""
        self.state["specialist"] = copy_of(module)

    def load(self, tensors: Mapping[str, Tensor], architecture: str | None = None) -> LightningModule:
        """Fill a shared module with weights that were sent, e.g. the global model's, until the turn ends.

        Args:
            tensors: named weights and buffers.
            architecture: whose module; default the client's own, of which a specialist is then no longer there.

        Raises:
            RuntimeError: outside of a `turn`.
            ValueError: the tensors do not fit.
        """
        architecture = architecture or self.architecture
        module = self._borrow(architecture)
        self._modules.private.discard(architecture)
        load_into(module, tensors)
        return module

    def _borrow(self, architecture: str) -> LightningModule:
        """An architecture's module, which is this client's until its turn ends."""
        turn = self._modules
        if turn is None:
            raise RuntimeError(
                f"client {self.id} uses a model outside of its turn, when others may overwrite the weights; "
                "use it within `with client.turn():`"
            )
        if architecture not in turn.borrowed:
            turn.borrowed[architecture] = turn.stack.enter_context(self.modules.borrow(architecture))
        return turn.borrowed[architecture]

    def calibration_accuracy(self) -> float:
        """Accuracy of the specialist on the held-out private share; chance where there is none."""
        if len(self.calibration) == 0:
            return 1.0 / self.num_classes
        logits = self.predict(self.specialist(), self.calibration)
        return float((logits.argmax(1) == self.calibration.labels).float().mean())


class Server(Participant):
    """The coordinator: public data, the student, and no private sample.

    Args:
        validation: labelled samples for model selection. The student never trains on them; `fltrust`, where there are
            no public samples, trains a model for reference on them, and adaptive weights look where they would lead.
        test: labelled samples for the report.
        student: the global model, None for a method that has none.
        teacher: the large model of standard distillation, None otherwise.
        pooled: what all clients train on, in one place, only for the methods that are the centralised reference.
        classes: names of the classes; None calls them 0, 1, ….
        test_stages: stage of each test sample, int64 [n], where data arrive in stages and the test samples say which.
        participant: the arguments of `Participant`.

    Attributes:
        pooled: those that are there now.
        cohort: ids of the clients that are asked in the current round, those who drop out included; set by the loop.
    """

    def __init__(
        self,
        *,
        validation: Samples,
        test: Samples,
        student: LightningModule | None = None,
        teacher: LightningModule | None = None,
        pooled: Samples | ScheduledSamples | None = None,
        classes: list[str] | None = None,
        test_stages: np.ndarray | None = None,
        **participant: Any,
    ):
        super().__init__(id=-1, **participant)
        self.validation, self.test = validation, test
        self.student, self.teacher, self._pooled, self.test_stages = student, teacher, pooled, test_stages
        self.update_data()
        self.classes = classes or [str(i) for i in range(self.num_classes)]
        self.cohort: list[int] = []
        self._downloads: dict[str, Message] = {}

    def start_round(self, round: int) -> None:
        """Start a round and drop cached downloads of the previous one."""
        super().start_round(round)
        self._downloads = {}

    def update_data(self) -> None:
        """Switch to the pooled data of the current stage."""
        self.pooled = samples_at(self._pooled, self.stage)

    def round_trip_state(self) -> None:
        """Make the state what a checkpoint would give back, so that a resumed run goes on from the very same."""
        self.state = checkpoint.as_saved(self.state)

    def clone(
        self,
        state: dict[str, Any] | None = None,
        pooled: Samples | ScheduledSamples | None = None,
        seed: int | None = None,
    ) -> Server:
        """Copy the server, for an experiment beside the run: same models and settings, nothing in its cache.

        Args:
            state: the copy's own; None: empty.
            pooled: samples in place of the pooled ones; None: the server's.
            seed: root of its random streams; None: the server's.
        """
        twin = copy.copy(self)
        twin.state, twin.cache, twin.metrics, twin._drawn = {} if state is None else state, {}, {}, Counter()
        twin._downloads, twin.cohort = {}, list(self.cohort)
        twin.seed = self.seed if seed is None else seed
        if pooled is not None:
            twin._pooled = pooled
            twin.update_data()
        return twin

    def cached_download(self, key: str, make: Callable[[], Message]) -> Message:
        """Return a download of this round that several clients receive, made once, so that it is encoded once.

        Args:
            key: identifies the message among the downloads of this round.
            make: builds the message.
        """
        if key not in self._downloads:
            self._downloads[key] = make()
        return self._downloads[key]


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's weights and buffers, copied to host memory."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in module_state(module).items()}
