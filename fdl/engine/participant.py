"""Base of clients and server: public data, a runtime, a checkpointed state, and random streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from fdl.engine.requests import FitRequest, PredictRequest, Requests
from fdl.engine.runtime import Runtime
from fdl.modules.objectives import Objective
from fdl.utils.seeding import stream_seed, torch_stream

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from fdl.datamodules.arrivals import Arrival
    from fdl.datamodules.samples import Samples
    from fdl.encoders.base import Encoder
    from fdl.engine.inference import OutputSelector
    from fdl.recipe.config import Fit


T = TypeVar("T")


class PrivacyPolicy(Protocol):
    """The privacy budget, and the accountant that measures it.

    Attributes:
        delta: the δ at which ε is computed.
        epsilon: the budget; None if ε is only reported.
        level: the protected unit, ``"example"`` or ``"institution"``.
    """

    delta: float
    epsilon: float | None
    level: str

    def spent(self, events: Sequence[Mapping[str, Any]]) -> float:
        """Return the ε of the composition of mechanisms.

        Args:
            events: the mechanisms, made by `fdl.privacy.accounting.event`.
        """
        ...


class PrivateTrainer(Protocol):
    """Trains on private samples with noise."""

    def fit(
        self,
        client: Any,
        module: LightningModule,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
    ) -> dict[str, float]:
        """Train a client's module on private samples.

        Args:
            client: the `fdl.participants.Client` that trains; its privacy account is charged.
            module: trained in place.
            samples: the client's private samples.
            config: steps or epochs, batch size, optimiser and schedule.
            objective: loss to minimise; None: the module's own training step.
            name: of the training: prefix of its losses in `metrics`, and purpose of its random stream.

        Returns:
            Losses by name; empty if they would reveal more than the noise allows.
        """
        ...


class ModuleSource(Protocol):
    """Lends modules that a client may load with weights, as `Runtime` does with those that all clients share."""

    def borrow(
        self, architecture: str, weights: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[LightningModule]:
        """Borrow an architecture's module for the length of a context.

        Args:
            architecture: the architecture's key.
            weights: tensors to load, by the names of `module_state`; None keeps the module's weights.
        """
        ...


class Participant:
    """A client or the server: owns data, a checkpointed state, and its random streams.

    Args:
        id: the client's number, -1 for the server.
        runtime: trains its models and predicts with them.
        seed: the recipe's seed.
        local_training: settings of training on private data.
        server_distil: settings of the student's training on the proxy set.
        client_distil: settings of a client's training on the server's download.
        proxy: the public proxy set, unlabelled.
        public: labelled public samples to train on; None or empty if there are none. They belong to the server: a
            method whose clients use them counts their bytes in `setup_bytes`.
        num_classes: the data's number of classes, 0 if there are none.
        task: the data's task, a key of `fdl.metrics.tasks.TASKS`.
        model_kwargs: arguments for a model's constructor that depend on the data, e.g. their tokenizer.
        encoder: the frozen public encoder, None if the recipe names none.
        arrival: schedule by which private data arrive; None: all are there from the start.
        privacy: the privacy budget and its accountant; None if the recipe sets neither budget nor δ.
        noise_seed: a secret from which noise and secret samplings are drawn; None draws them from `seed`, which is for
            simulations.

    Attributes:
        round: the current round, set by the loop.
        stage: number of times that new data have arrived before this round.
        state: tensors, numbers and nested dicts of them that must survive a restart.
        cache: results that can be computed again; never saved.
        metrics: metrics of the current turn, which the loop logs.
    """

    def __init__(
        self,
        id: int,
        runtime: Runtime,
        seed: int,
        local_training: Fit,
        server_distil: Fit,
        client_distil: Fit,
        proxy: Samples | None,
        num_classes: int,
        encoder: Encoder | None = None,
        task: str = "classification",
        model_kwargs: Mapping[str, Any] | None = None,
        arrival: Arrival | None = None,
        public: Samples | None = None,
        privacy: PrivacyPolicy | None = None,
        noise_seed: str | None = None,
    ):
        self.id, self.runtime, self.seed = id, runtime, seed
        self._noise_seed, self._drawn = noise_seed, Counter[str]()
        self.local_training, self.server_distil, self.client_distil = local_training, server_distil, client_distil
        self.proxy, self.public, self.num_classes, self.encoder = proxy, public, num_classes, encoder
        self.task, self.model_kwargs = task, dict(model_kwargs or {})
        self.arrival, self.round, self.stage, self.privacy = arrival, 0, 0, privacy
        self.state: dict[str, Any] = {}
        self.cache: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def start_round(self, round: int) -> None:
        """Start a round: reset metrics and random draws, and update data that arrive in stages.

        Args:
            round: its number, from 1; 0 for the setup.
        """
        self.round, self.metrics, self._drawn = round, {}, Counter()
        stage = 0 if self.arrival is None else self.arrival.stage(round)
        if stage != self.stage:
            self.stage = stage
            self.update_data()

    def update_data(self) -> None:
        """Switch to the data of the current stage; subclasses with such data override this."""

    def rng(self, purpose: str) -> torch.Generator:
        """Return this participant's random stream for one purpose in the current round.

        Args:
            purpose: name of the stream.
        """
        return torch_stream(self.seed, purpose, self.round, self.id)

    @property
    def has_noise_seed(self) -> bool:
        """True if noise is drawn from a secret instead of the recipe's seed."""
        return self._noise_seed is not None

    def secret_seed(self, purpose: str) -> int:
        """Return the seed of a stream of noise or of a secret sampling, a different one at every call.

        Calls are counted within a round, so that two draws in one round are independent, and a round that is run again,
        after a restart or in another process, repeats its draws. Derived from the noise seed if there is one, else from
        the recipe's seed.

        Args:
            purpose: name of the stream.
        """
        self._drawn[purpose] += 1
        count = self._drawn[purpose]
        name = purpose if count == 1 else f"{purpose}/{count}"
        return stream_seed(self.seed if self._noise_seed is None else self._noise_seed, name, self.round, self.id)

    def noise(self, purpose: str) -> torch.Generator:
        """Return a new random stream, seeded by `secret_seed`.

        Args:
            purpose: name of the stream.
        """
        return torch.Generator().manual_seed(self.secret_seed(purpose))

    def fit(
        self,
        module: LightningModule,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
        watch: Callable[[int], bool] | None = None,
    ) -> dict[str, float]:
        """Train a module on this participant's random stream, and add the losses to `metrics`.

        Args:
            module: trained in place.
            samples: training samples.
            config: steps or epochs, batch size, optimiser and schedule.
            objective: loss to minimise; None: the module's own training step.
            name: of the training: prefix of its losses in `metrics`, and purpose of its random stream.
            watch: called with the number of steps done; True ends the training.

        Returns:
            Losses by name, each the mean over the training.
        """
        losses = self.runtime.fit(module, samples, config, self.rng(name), objective, max(self.round, 1), watch)
        self.log_losses(name, losses)
        return losses

    def log_losses(self, name: str, losses: Mapping[str, float]) -> None:
        """Add the losses of a training to `metrics`.

        Args:
            name: name of the training.
            losses: means over steps, by name.
        """
        self.metrics.update({f"{name}/{key}": value for key, value in losses.items()})

    def run(self, request: FitRequest | PredictRequest) -> Any:
        """Compute a request at once: what `fit` or `predict` returns.

        Args:
            request: what a local update has yielded.
        """
        if isinstance(request, FitRequest):
            return self.fit(request.module, request.samples, request.config, request.objective, request.name)
        return self.predict(request.module, request.samples, request.what)

    def run_all(self, requests: Requests[T]) -> T:
        """Compute every request of a generator at once, and return what it returns.

        Args:
            requests: a generator that has not started, e.g. of a helper that clients call with ``yield from``.
        """
        try:
            request = next(requests)
            while True:
                request = requests.send(self.run(request))
        except StopIteration as end:
            return end.value

    def predict(self, module: LightningModule, samples: Samples, what: OutputSelector = "logits") -> Tensor:
        """Predict without gradients.

        Args:
            module: a module whose forward returns an `Output`.
            samples: n samples.
            what: the field of `Output` to collect, e.g. ``"logits"`` or ``"embedding"``, or a function of module and
                inputs whose result has the same shape for every batch except for the first dimension.

        Returns:
            float32 tensor on the CPU, [n, …].
        """
        return self.runtime.predict(module, samples, what)
