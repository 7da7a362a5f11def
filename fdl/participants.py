"""Client and server: private and public data, models, random streams and checkpointed state."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fdl.datamodules.arrivals import samples_at
from fdl.datamodules.guarded import GuardedSamples, PrivateDataGate, is_guarded
from fdl.engine.participant import ModuleSource, Participant, PrivacyPolicy, PrivateTrainer
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


class _BorrowedModules:
    """The shared modules that a client has borrowed for one turn.

    Attributes:
        stack: returns them when the turn ends.
        modules: the modules by architecture.
        private: architectures whose module holds the client's private weights, as trained so far in this turn.
    """

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.modules: dict[str, LightningModule] = {}
        self.private: set[str] = set()


class Client(Participant):
    """An institution: private data that never leave it, and a specialist of its own architecture.

    Args:
        architecture: key of its specialist among the runtime's architectures; or of the student, for methods whose
            clients train that.
        train: private labelled samples to train on.
        calibration: private labelled samples held out from training, to calibrate confidence; may be empty.
        dp_sgd: trains on private samples with noise, and guards them against any other use; None trains without noise.
        store: keeps its state on disk between its turns; None keeps it in memory.
        name: display name of the site whose data it has; empty if it only has a number.
        participant: the arguments of `Participant`.

    Attributes:
        train: the training samples that have arrived by the current stage.
        calibration: the calibration samples of the current stage.
        data_corruption: an adversary's function from samples and their use, ``"train"`` or ``"calibration"``, to
            corrupted samples; None for an honest client.
        corruption_start: the round from which `data_corruption` is applied.
        data_gate: open while private samples may be read, under `dp_sgd`.
        modules: lends the client its modules: the runtime, whose modules all clients share, or a stack of models while
            an executor trains several clients at once.
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
        self._modules: _BorrowedModules | None = None
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
        """Offload the client's state to disk, if a store is used; else normalise it to what a checkpoint would restore.

        Args:
            changed: False if the state was only read.
        """
        if self._storage.offload(changed):
            self.cache.clear()

    def checkpoint_state(self) -> dict[str, Any]:
        """Offload the state and return what a checkpoint stores for it: the state, or a reference to its file."""
        self.offload_state()
        return self._storage.to_checkpoint()

    def restore(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Restore the result of `checkpoint_state`.

        Args:
            saved: the state, or the reference to its file.
            folder: folder of the file that a reference names.
        """
        self._storage.from_checkpoint(saved, folder)

    def clone(
        self,
        state: dict[str, Any] | None = None,
        train: Samples | ScheduledSamples | None = None,
        seed: int | None = None,
        honest: bool = False,
    ) -> Client:
        """Copy the client for an experiment outside of the run: same data, streams and settings, with an empty cache.

        Args:
            state: state of the copy, in memory; None: empty.
            train: private samples instead of the client's; the same corruption and the same gate apply to them.
            seed: root of its random streams; None: the client's.
            honest: omit an adversary's corruption of data.
        """
        twin = copy.copy(self)
        twin._modules = None
        twin._storage, twin.state = OffloadedState(None, self.id), {} if state is None else state
        twin.cache, twin.metrics, twin._drawn = {}, {}, Counter()  # draws again what the client drew in this round
        twin.seed = self.seed if seed is None else seed
        if honest:
            twin.data_corruption, twin._corrupted = None, False
        if train is not None:
            twin._train = train
        if train is not None or honest:
            twin.update_data()
        return twin

    def start_round(self, round: int) -> None:
        """Start a round; from `corruption_start` on, with the data that an adversary has corrupted.

        Args:
            round: its number, from 1; 0 for the setup.
        """
        super().start_round(round)
        corrupted = self.data_corruption is not None and round >= self.corruption_start
        if corrupted != self._corrupted:
            self._corrupted = corrupted
            self.update_data()

    def update_data(self) -> None:
        """Switch to the data of the current stage, and clear the cache of results from other data."""
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
        """Train a module; on private samples with noise, under DP-SGD.

        Args:
            module: trained in place.
            samples: private or public training samples.
            config: steps or epochs, batch size, optimiser and schedule.
            objective: loss to minimise; None: the module's own training step.
            name: of the training: prefix of its losses in `metrics`, and purpose of its random stream.
            watch: called with the number of steps done; True ends the training. Not called under DP-SGD.

        Returns:
            Losses by name.
        """
        if self.dp_sgd is not None and is_guarded(samples):
            return self.dp_sgd.fit(self, module, samples, config, objective, name)
        return super().fit(module, samples, config, objective, name, watch)

    @property
    def samples(self) -> int:
        """Number of private samples to train on."""
        return len(self.train)

    @property
    def reported_samples(self) -> int:
        """Number of samples that it uploads as the weight of its average: 1 under DP-SGD, which hides the number."""
        return self.samples if self.dp_sgd is None else min(self.samples, 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Take a turn for the length of this context: the shared modules that the client loads are reserved for it.

        Raises:
            RuntimeError: the client's turn has begun already.
        """
        if self._modules is not None:
            raise RuntimeError(f"client {self.id} has its turn already")
        self._modules = _BorrowedModules()
        try:
            with self._modules.stack:
                yield
        finally:
            self._modules = None

    def specialist(self) -> LightningModule:
        """Return the client's private model, loaded with its weights unless it already was in this turn.

        Raises:
            RuntimeError: called outside of a `turn`.
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
        """Load downloaded weights, e.g. the global model's, into a shared module until the turn ends.

        Args:
            tensors: weights and buffers by name.
            architecture: key of the module's architecture; default the client's own, whose specialist this overwrites.

        Returns:
            The module.

        Raises:
            RuntimeError: called outside of a `turn`.
            ValueError: the tensors do not fit.
        """
        architecture = architecture or self.architecture
        module = self._borrow(architecture)
        self._modules.private.discard(architecture)
        load_into(module, tensors)
        return module

    def _borrow(self, architecture: str) -> LightningModule:
        """Borrow an architecture's shared module until the turn ends."""
        turn = self._modules
        if turn is None:
            raise RuntimeError(
                f"client {self.id} uses a model outside of its turn, when others may overwrite the weights; "
                "use it within `with client.turn():`"
            )
        if architecture not in turn.modules:
            turn.modules[architecture] = turn.stack.enter_context(self.modules.borrow(architecture))
        return turn.modules[architecture]

    def calibration_accuracy(self) -> float:
        """Return the specialist's accuracy on the calibration samples; chance level if there are none."""
        if len(self.calibration) == 0:
            return 1.0 / self.num_classes
        logits = self.predict(self.specialist(), self.calibration)
        return float((logits.argmax(1) == self.calibration.labels).float().mean())


class Server(Participant):
    """The coordinator: public data, the student, and no private sample.

    Args:
        validation: labelled samples for model selection. The student never trains on them; `fltrust`, without public
            samples, trains its reference model on them, and adaptive client weights use the loss gradient on them.
        test: labelled samples for the report.
        student: the global model, None for a method that has none.
        teacher: the large model of standard distillation, None otherwise.
        pooled: the samples of all clients in one place, for centralised reference methods only.
        classes: names of the classes; None calls them 0, 1, ….
        test_stages: stage of each test sample, int64 [n], if data arrive in stages and the test samples have one.
        participant: the arguments of `Participant`.

    Attributes:
        pooled: the pooled samples that have arrived by the current stage.
        cohort: ids of the clients sampled for the current round, including those that drop out; set by the loop.
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
        """Normalise the state to what a checkpoint would restore, so that a resumed run continues identically."""
        self.state = checkpoint.as_saved(self.state)

    def clone(
        self,
        state: dict[str, Any] | None = None,
        pooled: Samples | ScheduledSamples | None = None,
        seed: int | None = None,
    ) -> Server:
        """Copy the server for an experiment outside of the run: same models and settings, with an empty cache.

        Args:
            state: state of the copy; None: empty.
            pooled: samples instead of the pooled ones; None: the server's.
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
        """Return a download of this round that several clients receive, built and encoded once.

        Args:
            key: identifies the message among the downloads of this round.
            make: builds the message.
        """
        if key not in self._downloads:
            self._downloads[key] = make()
        return self._downloads[key]


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy a module's weights and buffers to host memory, by name."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in module_state(module).items()}
