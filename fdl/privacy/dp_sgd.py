"""DP-SGD: training whose result hardly depends on any single example (Abadi et al., 2016).

In every step each example takes part by chance (Poisson sampling), its gradient is scaled down to a norm of at most C,
and Gaussian noise of standard deviation z · C is added to their sum, which is divided by the *expected* batch size.
Clipping, noise and step are opacus'. What follows from the weights, answers to public samples among them, is
post-processing: it costs nothing more, however often it is sent.

Noise and sampling come from streams of the recipe's seed: who knows the seed can subtract the noise. A site that is to
be protected must draw from a secure source of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdl.engine.optimizers import schedule_of
from fdl.modules.objectives import training_step
from fdl.privacy.accounting import Policy, affords, event, solve_noise, spend
from fdl.state.weights import trainable

if TYPE_CHECKING:
    from torch import nn

    from fdl.datamodules.samples import Samples
    from fdl.modules.objectives import Objective
    from fdl.participants import Client
    from fdl.recipe.config import Fit

log = logging.getLogger("fdl")


@dataclass(eq=False)
class DPSGD:
    """Training on private data with DP-SGD; settings shared by all clients.

    Args:
        policy: the budget.
        clip: C > 0.
        noise_multiplier: z ≥ 0, the same for all; None: solved for each client from the policy's ε.
        turns: by client, in how many rounds it is asked to train.
        ghost: clip without making the gradients of single examples, see `fdl.privacy.gradients.GhostClipping`.
        chunk: examples whose gradients are held at once; None for all of a batch.
    """

    policy: Policy
    clip: float
    noise_multiplier: float | None
    turns: Mapping[int, int]
    ghost: bool = False
    chunk: int | None = None
    _known: dict[Any, bool] = field(default_factory=dict, init=False, repr=False)  # by module and objective

    def check(self, clients: Sequence[Client]) -> None:
        """See that the clients' models can be trained.

        Raises:
            UserError: a model has batch normalisation.
        """
        from fdl.privacy.gradients import check_module

        for client in {client.architecture: client for client in clients}.values():
            module = client.runtime.shared_module(client.architecture)
            module.train()
            check_module(module, client.architecture)
        largest = max(clients, key=lambda client: client.samples)
        if self.policy.delta * len(largest.train) >= 1:
            log.warning(
                "privacy.delta = %g is too much for %d samples (client %d): giving one of them away whole would count "
                "as private",
                self.policy.delta,
                len(largest.train),
                largest.id,
            )

    def fit(
        self,
        client: Client,
        module: nn.Module,
        samples: Samples,
        config: Fit,
        objective: Objective | None = None,
        name: str = "fit",
    ) -> dict[str, float]:
        """Train on private samples, or leave the module as it is where the budget is spent.

        Losses are not given: they would be means over private samples, without noise. Arguments as in
        `Participant.fit`; gradients are clipped here, not by `config`.
        """
        count = len(samples)
        if client.runtime.is_dry_run or count == 0 or config.epochs == 0 or config.steps == 0 or not trainable(module):
            return {}
        probability = min(1.0, config.batch_size / count)
        epoch = -(-count // config.batch_size)
        steps = config.steps if config.steps is not None else config.epochs * epoch
        noise = self._noise(client, probability, steps)
        mechanism = event("dp_sgd", noise, probability, steps)
        if not affords(client, mechanism):
            client.metrics["privacy/exhausted"] = 1.0
            log.info("client %d: its privacy budget is spent, so it learns no more from its data", client.id)
            return {}
        # before the first look: an account that missed a step would be worse than one that counts a step too many
        spend(client, mechanism)
        with client.data_gate.open():
            self._train(client, module, samples, config, objective or training_step, name, mechanism)
        return {}

    def _noise(self, client: Client, probability: float, steps: int) -> float:
        """The noise of a client: found once, for all its rounds, and kept with its account."""
        account = client.state.setdefault("privacy", {})
        if "noise_multiplier" not in account:
            noise = self.noise_multiplier
            if noise is None:
                planned = steps * max(self.turns[client.id], 1)
                noise = solve_noise(
                    self.policy.epsilon, self.policy.delta, probability, planned, self.policy.accountant
                )
            account["noise_multiplier"] = float(noise)
        return account["noise_multiplier"]

    def _train(
        self,
        client: Client,
        module: nn.Module,
        samples: Samples,
        config: Fit,
        objective: Objective,
        name: str,
        mechanism: Mapping[str, Any],
    ) -> None:
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        from fdl.privacy.gradients import GhostClipping, PerExampleGradients, check_module, check_objective

        runtime, fabric = client.runtime, client.runtime.fabric
        probability = mechanism["sampling_probability"]
        convert = fabric.strategy.precision.convert_input
        to = lambda batch: convert(runtime.to_device(batch))  # noqa: E731
        module.train()
        check_module(module)
        kind = type(module), getattr(objective, "__qualname__", type(objective).__qualname__)
        known = kind in self._known
        if not known:
            check_objective(module, objective, samples, fabric, to)
        wrapped = runtime.steps.optimizers.fresh(module, trainable(module), config)
        scheduler, interval = schedule_of(wrapped.optimizer, config, max(client.round, 1))
        stream = torch.Generator(runtime.device)
        stream.manual_seed(client.secret_seed(f"{name}/noise"))
        if self.ghost:
            gradients = GhostClipping(module, objective, fabric, self.clip)
        else:
            gradients = PerExampleGradients(module, objective, fabric, self._known.get(kind, False))
        optimizer = (DPOptimizerFastGradientClipping if self.ghost else DPOptimizer)(
            wrapped.optimizer,
            noise_multiplier=mechanism["noise_multiplier"],
            max_grad_norm=self.clip,
            expected_batch_size=probability * len(samples),
            generator=stream,
        )
        order = client.noise(name)  # who takes part in a step must not be known: the account counts on it
        drawn = poisson(len(samples), probability, mechanism["count"], order)
        try:
            if self.ghost and not known:
                few = torch.arange(min(8, len(samples)))
                gradients.check(to(samples.batch(few)), len(few))
            for step, indices in enumerate(drawn, 1):
                parts = indices.split(self.chunk or len(samples)) if len(indices) else [indices]
                for number, part in enumerate(parts, 1):
                    gradients(to(samples.batch(part, order)) if len(part) else None, len(part))
                    optimizer.signal_skip_step(number < len(parts))
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                ended = step % -(-len(samples) // config.batch_size) == 0
                if scheduler is not None and (interval == "step" or (interval == "epoch" and ended)):
                    scheduler.step()
        finally:
            gradients.close()
        self._known[kind] = not self.ghost and gradients.apart


def poisson(count: int, probability: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches in which every example takes part by itself with the same chance; some may be empty.

    Args:
        count: number of examples.
        probability: the chance.
        steps: how many batches.
        generator: the stream to draw from.

    Yields:
        Indices, int64, rising.
    """
    for _ in range(steps):
        yield torch.nonzero(torch.rand(count, generator=generator) < probability).squeeze(1)
