"""Codistillation of pools of clients: each pool averages a model of its own size, and the models teach each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from lightning import LightningModule

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.pools import (
    PoolAggregates,
    PoolMeans,
    Weights,
    architectures,
    codistill,
    interpolate,
    prefix_names,
    stream_of,
    strip_prefix,
)
from fdl.knowledge.aggregation.server_optimizers import Adam, ServerOptimizer
from fdl.knowledge.distillation.targets import ResponseObjective
from fdl.knowledge.distillation.token_pools import codistill_tokens, require_equal_tokens
from fdl.messages import Parameters
from fdl.methods.base import Method
from fdl.participants import Client, Server
from fdl.robust.base import RobustRule
from fdl.robust.parameters import RobustParameters
from fdl.state.weights import load_into, module_state
from fdl.utils.seeding import stream_seed


class Codistillation(Method):
    """FedAvg in pools of different capacity, whose models learn from each other at the server (arXiv 2310.02549).

    Pools are the different entries of the recipe's specialists, from the smallest model to the largest; the recipe's
    student must be the same model as the first of them. Each pool's model is averaged over the clients that train it,
    by sample counts, and the mean displacement D_fed is the server optimiser's pseudo-gradient. On the unlabelled proxy
    set each model then learns from the mean probabilities of the others, of classes or of next tokens, all of them
    taken before any model learns (T² KL, the recipe's `server_distil` settings):

    - periodic: every `period` rounds, starting from the round's averages.
    - merged: in each round, starting from the weights that the clients downloaded. The resulting displacement D_kd is
      mixed with that of the clients, D = (1 − α) D_fed + α D_kd, and one server optimiser takes one step with it.

    A pool without uploads in a round is neither averaged nor merged in it.

    Args:
        mode: schedule by which models learn from each other, ``"merged"`` or ``"periodic"``.
        sharing: ``"nested"``: a client trains the model of its own pool and all smaller ones; ``"disjoint"``: that of
            its own pool only, e.g. where pools hold data of different kinds.
        alpha: α of merged, in [0, 1]; 0 is averaging alone, 1 ignores the clients' weights.
        period: rounds between two distillations of periodic, ≥ 1.
        temperature: T > 0.
        optimizer: the server's optimiser, with separate moments per pool; None is Adam (FedAdam).
        robust: robust aggregation rule instead of each pool's mean, against Byzantine clients; None is the mean.
    """

    name = "codistillation"
    sends = (Parameters,)
    tasks = ("classification", "language")
    requires = ("student", "specialists", "proxy")

    def __init__(
        self,
        mode: Literal["merged", "periodic"] = "merged",
        sharing: Literal["nested", "disjoint"] = "nested",
        alpha: float = 0.5,
        period: int = 1,
        temperature: float = 1.0,
        optimizer: ServerOptimizer | None = None,
        robust: RobustRule | None = None,
    ):
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must be in [0, 1], got {alpha}")
        if period < 1:
            raise UserError(f"period must be at least 1 round, got {period}")
        if not temperature > 0:
            raise UserError(f"temperature must be > 0, got {temperature}")
        self.merged, self.nested, self.alpha, self.period = mode == "merged", sharing == "nested", alpha, period
        self.optimizer, self.temperature, self.robust = optimizer or Adam(), temperature, robust

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """Draw first weights for each pool, and record which client belongs to which pool."""
        first, *others = architectures(server.runtime)
        if not others:
            raise UserError("specialists: codistillation needs two different models or more, the smallest first")
        for pool in (first, *others) if server.task == "language" else ():
            require_equal_tokens(server, server.runtime.shared_module(pool), pool)
        own, small = (module_state(m) for m in (server.student, server.runtime.shared_module(first)))
        if [(k, t.shape) for k, t in own.items()] != [(k, t.shape) for k, t in small.items()]:
            raise UserError("student: must be the model of the first of the specialists, with the same arguments")
        server.state["pools"] = {
            pool: server.runtime.first_weights(pool, stream_seed(server.seed, f"init/{pool}")) for pool in others
        }
        server.state["members"] = {str(client.id): client.architecture for client in clients}

    def server_models(self, server: Server) -> Iterator[tuple[str, LightningModule]]:
        """Yield each pool's name and model, for evaluation; a model may be used until the next one is requested."""
        for pool, tensors in self._weights(server).items():
            with server.runtime.borrow(pool, tensors) as module:
                yield pool, module

    def download(self, server: Server, client: int) -> Parameters:
        """Return the models that a client trains, one message for all clients of a pool."""
        pool, weights = server.state["members"][str(client)], self._weights(server)
        pools = self._trained_pools(list(weights), pool)
        return server.cached_download(pool, lambda: Parameters(prefix_names({name: weights[name] for name in pools})))

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train the client's models on its private data, the smallest first, and return their weights."""
        results = {}
        for pool in self._trained_pools(architectures(client.runtime), client.architecture):
            module = client.load(strip_prefix(download.tensors, pool), pool)
            yield FitRequest(module, client.train, client.local_training, name=stream_of(client, "fit", pool))
            results[pool] = module_state(module)
        return Parameters(prefix_names(results), samples=client.reported_samples)

    def aggregate(self, server: Server) -> PoolAggregates:
        """Return one mean per pool, weighted by sample counts, or one robust aggregate per pool."""
        weights = self._weights(server)
        trained = {int(id): self._trained_pools(list(weights), pool) for id, pool in server.state["members"].items()}
        if self.robust is None:
            return PoolMeans(weights, trained)
        make = lambda pool, like: RobustParameters(self.robust, server, like, pool, pool)  # noqa: E731
        return PoolAggregates(weights, trained, make)

    def server_update(self, server: Server, knowledge: Mapping[str, Weights]) -> dict[str, float]:
        """Average each pool, and distil the pools into each other, merged with the averages or after them."""
        before = self._weights(server)
        learnt = self._codistill(server, before) if self.merged and self.alpha > 0 else {}
        after = dict(before)
        for pool, mean in knowledge.items():
            # (1 − α) D_fed + α D_kd is the displacement to this point; at α = 0 and 1 it is the one end to the bit
            target = interpolate(mean, learnt[pool], self.alpha) if pool in learnt else mean
            trained = {name for name, _ in server.runtime.shared_module(pool).named_parameters()}
            moments = server.state.setdefault("moments", {}).setdefault(pool, {})
            after[pool] = self.optimizer.step(before[pool], target, trained & before[pool].keys(), moments)
        if not self.merged and server.round % self.period == 0:
            after = self._codistill(server, after)
        first, *others = after
        load_into(server.student, after[first])
        server.state["pools"] = {pool: dict(after[pool].items()) for pool in others}
        return {}

    def _codistill(self, server: Server, weights: Mapping[str, Weights]) -> dict[str, Weights]:
        """Return each pool's weights after it has learnt from the others."""
        if server.task == "language":
            return codistill_tokens(server, weights, self.temperature)
        return codistill(server, weights, ResponseObjective("kl", self.temperature))

    def _weights(self, server: Server) -> dict[str, Weights]:
        """Return each pool's weights, the student's first."""
        first, *others = architectures(server.runtime)
        return {first: module_state(server.student)} | {pool: server.state["pools"][pool] for pool in others}

    def _trained_pools(self, pools: list[str], own: str) -> list[str]:
        """Return the names of the pools whose models a client trains.

        Args:
            pools: all pools, from the smallest to the largest.
            own: the client's own pool.
        """
        return pools[: pools.index(own) + 1] if self.nested else [own]
