"""Client and server: who holds which data, model, random stream and state."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fdl.datamodules.arrivals import samples_at
from fdl.datamodules.guarded import GuardedSamples, PrivateDataGate, is_guarded
from fdl.engine.requests import FitRequest, PredictRequest
from fdl.engine.runtime import Runtime
from fdl.modules.objectives import Objective
from fdl.state import checkpoint
from fdl.state.client_store import DiskStore, resolve
from fdl.state.weights import load_into, module_state
from fdl.utils.seeding import stream_seed, torch_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from lightning import LightningModule
    from torch import Tensor

    from fdl.datamodules.arrivals import Arrival, ScheduledSamples
    from fdl.datamodules.samples import Samples
    from fdl.encoders.base import Encoder
    from fdl.engine.inference import OutputSelector
    from fdl.messages import Message
    from fdl.recipe.config import Fit


class PrivacyPolicy(Protocol):
    """What an account of differential privacy is held against.

    Attributes:
        delta: the δ at which ε is given.
        epsilon: the budget; None where ε is only reported.
        level: whose contribution is protected, ``"example"`` or ``"institution"``.
    """

    delta: float
    epsilon: float | None
    level: str

    def spent(self, events: Sequence[Mapping[str, Any]]) -> float:
        """The ε of mechanisms run one after another.

        Args:
            events: the mechanisms, as `fdl.privacy.accounting.event` makes them.
        """
        ...


class Templates(Protocol):
    """One module per architecture, to be filled with weights; `Runtime` has those that all clients share."""

    def template(self, architecture: str) -> LightningModule:
        """The module of an architecture."""
        ...

    def holder(self, architecture: str) -> Any:
        """The participant whose weights the module holds, None when nobody's."""
        ...

    def hold(self, architecture: str, owner: Any) -> None:
        """Note whose weights the module holds."""
        ...


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


class Participant:
    """One who computes: owns data, a state that is checkpointed, and its own streams of randomness.

    Args:
        id: the client's number, -1 for the server.
        runtime: where it computes.
        seed: the recipe's seed.
        local: how it trains on private data.
        distil: how the server trains the student on the proxy set.
        digest: how a client learns from what the server sends back.
        proxy: the public proxy set, unlabelled.
        public: labelled public samples to train on; None or empty where there are none. They are the server's: a
            method whose clients look at them counts their bytes in `setup_bytes`.
        num_classes: the data's number of classes, 0 where there are none.
        task: which of `fdl.metrics.tasks.TASKS` the data are for.
        provides: what the data tell a model's constructor, e.g. their tokenizer.
        encoder: the frozen public encoder, None where the recipe names none.
        arrival: when private data come in; None: all are there from the first.
        privacy: what an account of differential privacy is held against; None where there is no budget and no δ.
        noise_seed: a secret from which noise and secret samplings are drawn; None draws them from `seed`, which is for
            simulations.

    Attributes:
        round: the current round, set by the loop.
        stage: how many times new data have come in before it.
        state: tensors, numbers and nested dicts of them that must survive a restart.
        cache: what can be computed again; never saved.
        metrics: what happened in the current turn; the loop logs it.
    """

    def __init__(
        self,
        id: int,
        runtime: Runtime,
        seed: int,
        local: Fit,
        distil: Fit,
        digest: Fit,
        proxy: Samples | None,
        num_classes: int,
        encoder: Encoder | None = None,
        task: str = "classification",
        provides: Mapping[str, Any] | None = None,
        arrival: Arrival | None = None,
        public: Samples | None = None,
        privacy: PrivacyPolicy | None = None,
        noise_seed: str | None = None,
    ):
        self.id, self.runtime, self.seed = id, runtime, seed
        self._noise_seed, self._drawn = noise_seed, Counter[str]()
        self.local, self.distil, self.digest = local, distil, digest
        self.proxy, self.public, self.num_classes, self.encoder = proxy, public, num_classes, encoder
        self.task, self.provides = task, dict(provides or {})
        self.arrival, self.round, self.stage, self.privacy = arrival, 0, 0, privacy
        self.state: dict[str, Any] = {}
        self.cache: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def begin(self, round: int) -> None:
        """A new round has come."""
        self.round, self.metrics, self._drawn = round, {}, Counter()
        stage = 0 if self.arrival is None else self.arrival.stage(round)
        if stage != self.stage:
            self.stage = stage
            self.arrive()

    def arrive(self) -> None:
        """New private data have come in; here nobody has any."""

    def rng(self, purpose: str) -> torch.Generator:
        """This participant's stream for one purpose in the current round."""
        return torch_stream(self.seed, purpose, self.round, self.id)

    @property
    def has_noise_seed(self) -> bool:
        """Whether noise is drawn from a secret, and not from the recipe's seed."""
        return self._noise_seed is not None

    def secret_seed(self, purpose: str) -> int:
        """The seed of a stream of noise, or of a sampling that must stay secret: another one at every call.

        Calls are counted within a round, so that whatever is drawn twice in one is drawn independently, and that a
        round which is run again, after a restart or in another process, draws what it drew. From a noise seed, where
        there is one, else from the recipe's.

        Args:
            purpose: what the stream is for.
        """
        self._drawn[purpose] += 1
        count = self._drawn[purpose]
        name = purpose if count == 1 else f"{purpose}/{count}"
        return stream_seed(self.seed if self._noise_seed is None else self._noise_seed, name, self.round, self.id)

    def noise(self, purpose: str) -> torch.Generator:
        """A stream as `secret_seed` says."""
        return torch.Generator().manual_seed(self.secret_seed(purpose))

    def fit(
        self,
        module: LightningModule,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
    ) -> dict[str, float]:
        """Train a module; losses are also noted in `metrics` under `name`. Arguments as in `Runtime.fit`."""
        losses = self.runtime.fit(module, samples, config, self.rng(name), objective, max(self.round, 1))
        self.log_losses(name, losses)
        return losses

    def log_losses(self, name: str, losses: Mapping[str, float]) -> None:
        """Note the losses of a fit in `metrics`.

        Args:
            name: of the fit.
            losses: by their names.
        """
        self.metrics.update({f"{name}/{key}": value for key, value in losses.items()})

    def predict(self, module: LightningModule, samples: Samples, what: OutputSelector = "logits") -> Tensor:
        """Answer samples without gradients: float32 [n, …] on the CPU. Arguments as in `Runtime.predict`."""
        return self.runtime.predict(module, samples, what)

    def run(self, request: FitRequest | PredictRequest) -> Any:
        """The result of a request, computed at once: what `fit` or `predict` returns."""
        if isinstance(request, FitRequest):
            return self.fit(request.module, request.samples, request.config, request.objective, request.name)
        return self.predict(request.module, request.samples, request.what)


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
        corrupt: what an adversary makes of its samples, given them and whether they are for ``"train"`` or
            ``"calibration"``; None: nothing.
        corrupt_from: the round from which it does.
        gate: whether private samples may be read, under `dp_sgd`.
        templates: the modules that it fills with weights: the runtime's, which all clients share, or its own while an
            executor trains several clients side by side.
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
        self._store, self._state = store, None
        super().__init__(**participant)
        self.templates: Templates = self.runtime
        self.dp_sgd, self.gate, self.name = dp_sgd, PrivateDataGate(), name
        self.architecture, self._train, self._calibration = architecture, train, calibration
        self.corrupt: Callable[[Samples, str], Samples] | None = None
        self.corrupt_from, self._corrupted = 1, False
        self.arrive()

    @property
    def state(self) -> dict[str, Any]:
        """Its state, read from the store when somebody first asks after `rest`."""
        if self._state is None:
            self._state = {} if self._store is None else self._store.read(self.id)
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._state = state

    def rest(self, changed: bool = True) -> None:
        """Its turn is over: its state is as a file would give it back, and with a store none of it stays in memory.

        Args:
            changed: whether there may be something new to write.
        """
        if self._state is None:
            return
        if self._store is None:
            self._state = checkpoint.as_saved(self._state) if changed else self._state
            return
        if changed:
            self._store.write(self.id, self._state)
        self._state = None
        self.cache.clear()

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: its state, or where that lies."""
        self.rest()
        return self.state if self._store is None else self._store.reference(self.id)

    def restore(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Go back to what `saved` gave; `folder` is where files that it may name lie."""
        if self._store is None:
            self.state = resolve(saved, folder)
        else:
            self._store.refer(self.id, saved)
            self._state = None

    def begin(self, round: int) -> None:
        """A new round has come; from some round on, an adversary's data are others."""
        super().begin(round)
        corrupted = self.corrupt is not None and round >= self.corrupt_from
        if corrupted != self._corrupted:
            self._corrupted = corrupted
            self.arrive()

    def arrive(self) -> None:
        """Turn to the data that are there now, and forget what was made of others."""
        self.train, self.calibration = samples_at(self._train, self.stage), samples_at(self._calibration, self.stage)
        if self._corrupted:
            self.train = self.corrupt(self.train, "train")
            self.calibration = self.corrupt(self.calibration, "calibration")
        if self.dp_sgd is not None:
            self.train, self.calibration = (
                GuardedSamples(self.train, self.gate),
                GuardedSamples(self.calibration, self.gate),
            )
        self.cache.clear()

    def fit(
        self,
        module: LightningModule,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
    ) -> dict[str, float]:
        """Train a module, with noise where samples are private and the recipe asks for it; as `Participant.fit`."""
        if self.dp_sgd is not None and is_guarded(samples):
            return self.dp_sgd.fit(self, module, samples, config, objective, name)
        return super().fit(module, samples, config, objective, name)

    @property
    def samples(self) -> int:
        """How many private samples it trains on."""
        return len(self.train)

    @property
    def told_samples(self) -> int:
        """How many it says it has, beside weights that are averaged by it: 1, as all do, where training is private."""
        return self.samples if self.dp_sgd is None else min(self.samples, 1)

    def specialist(self) -> LightningModule:
        """Its private model: the architecture's template, filled with this client's weights."""
        module = self.templates.template(self.architecture)
        if self.templates.holder(self.architecture) is not self:
            if "specialist" not in self.state:
                seed = stream_seed(self.seed, "init", 0, self.id)
                self.state["specialist"] = self.runtime.first_weights(self.architecture, seed)
            load_into(module, self.state["specialist"])
            self.templates.hold(self.architecture, self)
        return module

    def keep(self, module: LightningModule) -> None:
        """Store the specialist's weights until the next turn."""
        self.state["specialist"] = copy_of(module)

    def load(self, tensors: Mapping[str, Tensor], architecture: str | None = None) -> LightningModule:
        """Fill a template with weights that were sent, e.g. the global model's.

        Args:
            tensors: named weights and buffers.
            architecture: whose template; default the client's own.
        """
        architecture = architecture or self.architecture
        module = self.templates.template(architecture)
        load_into(module, tensors)
        self.templates.hold(architecture, None)
        return module

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
        self.arrive()
        self.classes = classes or [str(i) for i in range(self.num_classes)]
        self.cohort: list[int] = []
        self._said: dict[str, Message] = {}

    def begin(self, round: int) -> None:
        """A new round has come, and what was said in the last one is old."""
        super().begin(round)
        self._said = {}

    def arrive(self) -> None:
        """Turn to the data that are there now."""
        self.pooled = samples_at(self._pooled, self.stage)

    def fit(
        self,
        module: LightningModule,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
        watch: Callable[[int], bool] | None = None,
    ) -> dict[str, float]:
        """Train a module; as `Participant.fit`, with `watch` as in `Runtime.fit`."""
        losses = self.runtime.fit(module, samples, config, self.rng(name), objective, max(self.round, 1), watch)
        self.log_losses(name, losses)
        return losses

    def rest(self) -> None:
        """The round is over: its state is as a checkpoint would give it back."""
        self.state = checkpoint.as_saved(self.state)

    def say(self, key: str, make: Callable[[], Message]) -> Message:
        """The message that several clients get in this round, made once, so that it is encoded once.

        Args:
            key: what tells one message of the round from another.
            make: makes the message.
        """
        if key not in self._said:
            self._said[key] = make()
        return self._said[key]


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's weights and buffers, copied to host memory."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in module_state(module).items()}
