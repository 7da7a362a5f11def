"""Base of clients and server: public data, a runtime, a checkpointed state, and random streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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


class Participant:
    """One who computes: owns data, a state that is checkpointed, and its own streams of randomness.

    Args:
        id: the client's number, -1 for the server.
        runtime: where it computes.
        seed: the recipe's seed.
        local_training: how it trains on private data.
        server_distil: how the server trains the student on the proxy set.
        client_distil: how a client learns from what the server sends back.
        proxy: the public proxy set, unlabelled.
        public: labelled public samples to train on; None or empty where there are none. They are the server's: a
            method whose clients look at them counts their bytes in `setup_bytes`.
        num_classes: the data's number of classes, 0 where there are none.
        task: which of `fdl.metrics.tasks.TASKS` the data are for.
        model_kwargs: what the data tell a model's constructor, e.g. their tokenizer.
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
        """Start a round: reset metrics and random draws, and update data that arrive in stages."""
        self.round, self.metrics, self._drawn = round, {}, Counter()
        stage = 0 if self.arrival is None else self.arrival.stage(round)
        if stage != self.stage:
            self.stage = stage
            self.update_data()

    def update_data(self) -> None:
        """Switch to the data of the current stage; nothing to do for a participant without data of its own."""

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
        watch: Callable[[int], bool] | None = None,
    ) -> dict[str, float]:
        """Train a module on this participant's stream, and add the losses to `metrics`.

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
        """Answer samples without gradients: float32 [n, …] on the CPU. Arguments as in `Runtime.predict`."""
        return self.runtime.predict(module, samples, what)
