"""Federation of several architectures (pools): their order, messages, means and codistillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdl.datamodules.samples import Samples
from fdl.engine.runtime import Runtime
from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.messages import Parameters
from fdl.modules.objectives import Objective
from fdl.participants import Participant, Server, copy_of

if TYPE_CHECKING:
    from fdl.engine.distributed.process_group import ProcessGroup

Weights = Mapping[str, Tensor]


def architectures(runtime: Runtime) -> list[str]:
    """Distinct architectures among the recipe's specialists, in its order.

    Args:
        runtime: builds the recipe's models.
    """
    return [key for key in runtime.factories if key not in ("student", "teacher")]


def labelled_bytes(samples: Samples, num_classes: int) -> int:
    """Bytes of samples with their labels: one byte per label, two for more than 256 classes.

    Args:
        samples: the samples.
        num_classes: number of classes.
    """
    return samples.nbytes + len(samples) * (1 if num_classes <= 256 else 2)


def prefix_names(weights: Mapping[str, Weights]) -> dict[str, Tensor]:
    """Merge the weights of several models into one dictionary with names ``pool/name``.

    Args:
        weights: weights by name, by pool.
    """
    return {f"{pool}/{name}": tensor for pool, tensors in weights.items() for name, tensor in tensors.items()}


def strip_prefix(tensors: Weights, pool: str) -> dict[str, Tensor]:
    """Select one model's weights from the result of `prefix_names`.

    Args:
        tensors: weights by ``pool/name``.
        pool: name of the model.
    """
    prefix = f"{pool}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def stream_of(participant: Participant, what: str, pool: str) -> str:
    """Name of a fit's random stream and log entries; those of the first pool equal those of a method without pools.

    Args:
        participant: the participant that fits.
        what: name of the fit.
        pool: name of the model.
    """
    return what if pool == architectures(participant.runtime)[0] else f"{what}/{pool}"


def interpolate(mean: Weights, learnt: Weights, alpha: float) -> dict[str, Tensor]:
    """Interpolate weights: (1 − α) mean + α learnt, exact to the bit at α = 0 and 1.

    Args:
        mean: weights at α = 0; integers, e.g. counts of batches, are taken from them.
        learnt: weights at α = 1.
        alpha: α in [0, 1].
    """
    return {
        name: torch.lerp(tensor, learnt[name].to(tensor.dtype), alpha) if tensor.is_floating_point() else tensor
        for name, tensor in mean.items()
    }


def codistill(server: Server, weights: Mapping[str, Weights], objective: Objective) -> dict[str, Weights]:
    """Train every pool's model on the mean probabilities of the other pools, all predicted before any training.

    Args:
        server: its proxy set is predicted, and trained on with its `server_distil` settings.
        weights: weights by pool, of the teachers and of the learners at the start.
        objective: loss of a learner, given the others' mean.

    Returns:
        The new weights by pool.
    """
    predictions, learnt = {}, {}
    with ExitStack() as borrowed:
        modules = {
            pool: borrowed.enter_context(server.runtime.borrow(pool, tensors)) for pool, tensors in weights.items()
        }
        for pool, module in modules.items():
            predictions[pool] = torch.softmax(server.predict(module, server.proxy), dim=1)
        for pool, module in modules.items():
            targets = torch.stack([values for other, values in predictions.items() if other != pool]).mean(0)
            samples = SoftLabelled(server.proxy, targets)
            server.fit(module, samples, server.server_distil, objective, stream_of(server, "distil", pool))
            learnt[pool] = copy_of(module)
    return learnt


class PoolAggregates(Aggregate):
    """One aggregate of weights per pool, over clients that upload one model or several.

    Args:
        like: tensors with the names, shapes and dtypes of each pool's model, by pool.
        trained: names of the pools whose models a client uploads, by client.
        mean: makes an empty aggregate for a pool's model, which can `merge` others.
    """

    def __init__(
        self,
        like: Mapping[str, Weights],
        trained: Mapping[int, Sequence[str]],
        mean: Callable[[str, Weights], Aggregate],
    ):
        self._like, self._trained, self._mean = like, trained, mean
        self._means: dict[str, Aggregate] = {}

    def add(self, message: Parameters, client: int) -> None:
        """Add one client's models.

        Args:
            message: their weights, by ``pool/name``.
            client: id of the sender.

        Raises:
            RejectedMessageError: one of them does not fit; all aggregates are unchanged.
        """
        if not isinstance(message, Parameters):
            raise RejectedMessageError(f"expected parameters, got {message.kind}")
        message.validate()
        pools = self._trained[client]
        unknown = [name for name in message.tensors if not name.startswith(tuple(f"{pool}/" for pool in pools))]
        if unknown:
            raise RejectedMessageError(f"a model of {', '.join(pools)} has no tensor {unknown[0]!r:.80}")
        fresh = {}
        for pool in pools:  # each separately first: a model that does not fit must not leave the others added
            fresh[pool] = self._mean(pool, self._like[pool])
            fresh[pool].add(Parameters(strip_prefix(message.tensors, pool), message.samples), client)
        for pool, mean in fresh.items():
            if pool in self._means:
                self._means[pool].merge(mean)
            else:
                self._means[pool] = mean

    def result(self) -> dict[str, Weights] | None:
        """The new weights of every pool with uploads, in the order of pools; None without uploads."""
        means = {pool: self._means[pool].result() for pool in self._like if pool in self._means}
        return {pool: mean for pool, mean in means.items() if mean is not None} or None


class PoolMeans(PoolAggregates):
    """One mean of weights per pool, weighted by sample counts.

    Args:
        like: tensors with the names, shapes and dtypes of each pool's model, by pool.
        trained: names of the pools whose models a client uploads, by client.
    """

    def __init__(self, like: Mapping[str, Weights], trained: Mapping[int, Sequence[str]]):
        super().__init__(like, trained, lambda pool, like: ParameterMean(like))

    def reduce(self, ranks: ProcessGroup) -> None:
        """Combine these means with their counterparts on all other ranks; a collective call.

        Args:
            ranks: the processes.
        """
        for pool, like in self._like.items():
            self._means.setdefault(pool, ParameterMean(like)).reduce(ranks)
