"""What methods of several architectures share: their order, their messages, their means."""

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
    """The different architectures among the recipe's specialists, in its order; equal entries are one."""
    return [key for key in runtime.factories if key not in ("student", "teacher")]


def labelled_bytes(samples: Samples, num_classes: int) -> int:
    """Bytes of samples with their labels: one each, two where there are more than 256 classes."""
    return samples.nbytes + len(samples) * (1 if num_classes <= 256 else 2)


def prefix_names(weights: Mapping[str, Weights]) -> dict[str, Tensor]:
    """The weights of several models under one roof: ``pool/name``."""
    return {f"{pool}/{name}": tensor for pool, tensors in weights.items() for name, tensor in tensors.items()}


def strip_prefix(tensors: Weights, pool: str) -> dict[str, Tensor]:
    """One model's weights out of `prefix_names`."""
    roof = f"{pool}/"
    return {name.removeprefix(roof): tensor for name, tensor in tensors.items() if name.startswith(roof)}


def stream_of(participant: Participant, what: str, pool: str) -> str:
    """A fit's stream and its place in the log; the smallest model's are those of a method without pools."""
    return what if pool == architectures(participant.runtime)[0] else f"{what}/{pool}"


def interpolate(mean: Weights, learnt: Weights, alpha: float) -> dict[str, Tensor]:
    """The point (1 − α) mean + α learnt, at α = 0 and 1 the one end to the bit; counters are the mean's."""
    return {
        name: torch.lerp(tensor, learnt[name].to(tensor.dtype), alpha) if tensor.is_floating_point() else tensor
        for name, tensor in mean.items()
    }


def codistill(server: Server, weights: Mapping[str, Weights], objective: Objective) -> dict[str, Weights]:
    """Every pool's weights after it has learnt from the mean probabilities of the others, all as they were before.

    Args:
        server: its proxy set is answered, and learnt on with its `server_distil` settings.
        weights: by pool, where teachers stand and learners start.
        objective: what a learner minimises, given the others' mean.
    """
    answers, learnt = {}, {}
    with ExitStack() as borrowed:
        modules = {
            pool: borrowed.enter_context(server.runtime.borrow(pool, tensors)) for pool, tensors in weights.items()
        }
        for pool, module in modules.items():
            answers[pool] = torch.softmax(server.predict(module, server.proxy), dim=1)
        for pool, module in modules.items():
            taught = torch.stack([said for other, said in answers.items() if other != pool]).mean(0)
            samples = SoftLabelled(server.proxy, taught)
            server.fit(module, samples, server.server_distil, objective, stream_of(server, "distil", pool))
            learnt[pool] = copy_of(module)
    return learnt


class PoolAggregates(Aggregate):
    """One aggregate of weights for each pool, of clients that send one model or several.

    Args:
        like: by pool, names, shapes and dtypes of its model.
        trained: by client, the pools whose models it sends.
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
        """Take in one client's models.

        Raises:
            RefusedError: one of them does not fit; all aggregates are as they were.
        """
        if not isinstance(message, Parameters):
            raise RejectedMessageError(f"expected parameters, got {message.kind}")
        message.validate()
        pools = self._trained[client]
        unknown = [name for name in message.tensors if not name.startswith(tuple(f"{pool}/" for pool in pools))]
        if unknown:
            raise RejectedMessageError(f"a model of {', '.join(pools)} has no tensor {unknown[0]!r:.80}")
        fresh = {}
        for pool in pools:  # each by itself first: a model that does not fit must leave no other behind
            fresh[pool] = self._mean(pool, self._like[pool])
            fresh[pool].add(Parameters(strip_prefix(message.tensors, pool), message.samples), client)
        for pool, mean in fresh.items():
            if pool in self._means:
                self._means[pool].merge(mean)
            else:
                self._means[pool] = mean

    def result(self) -> dict[str, Weights] | None:
        """The new weights of every pool that was heard, in the order of pools; None when none was."""
        means = {pool: self._means[pool].result() for pool in self._like if pool in self._means}
        return {pool: mean for pool, mean in means.items() if mean is not None} or None


class PoolMeans(PoolAggregates):
    """One mean for each pool, weighted by sample counts; arguments as above."""

    reduces = True

    def __init__(self, like: Mapping[str, Weights], trained: Mapping[int, Sequence[str]]):
        super().__init__(like, trained, lambda pool, like: ParameterMean(like))

    def reduce(self, ranks: ProcessGroup) -> None:
        """Take in what the same means took in on all other ranks, and let them do so."""
        for pool, like in self._like.items():
            self._means.setdefault(pool, ParameterMean(like)).reduce(ranks)
