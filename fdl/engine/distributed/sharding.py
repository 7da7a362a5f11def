"""`fabric.strategy: fsdp`: every rank holds a shard of every model, and all ranks train and predict together.

The ranks run the same program on the same numbers, in the same order, as if each were the only one; they divide the
weights, gradients and optimiser states of models, and the samples of training batches and predictions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from fdl.engine.distributed.sharded_gradients import (
    add_penalty_gradient,
    average_replicated,
    clip_gradients,
    penalty,
    split_sharded,
)
from fdl.engine.inference import OutputSelector, predict
from fdl.engine.prediction_cache import PredictionCache
from fdl.errors import UserError
from fdl.modules.objectives import Objective, PenalizedObjective, training_step
from fdl.state.sharded_handle import ShardedModelHandle
from fdl.state.shards import full_parameters, is_sharded, shard, with_gathered_blocks
from fdl.state.weights import module_state

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricOptimizer

    from fdl.datamodules.samples import Samples
    from fdl.engine.distributed.process_group import ProcessGroup
    from fdl.modules.types import Batch


class Sharder:
    """Shards models over all ranks, and runs the operations on them that involve all ranks.

    Gradients are averaged in at least 32 bits.

    Args:
        fabric: a launched Fabric, whose default process group is that of the devices.
        ranks: the processes.
    """

    def __init__(self, fabric: Fabric, ranks: ProcessGroup):
        self._fabric, self._ranks = fabric, ranks
        self._precision = fabric.strategy.precision.precision
        self._mesh = init_device_mesh(fabric.device.type, (ranks.count,))

    def place(self, module: LightningModule) -> LightningModule:
        """Shard a new module.

        Args:
            module: in host memory and in the recipe's precision, the same on all ranks.

        Returns:
            The same module, sharded in place.
        """
        names = list(module_state(module))
        shard(module, self._mesh, torch.bfloat16 if self._precision == "bf16-mixed" else None)
        ShardedModelHandle(module, names)
        for part in module.modules():
            if isinstance(part, LightningModule):
                part._device = self._fabric.device  # as Lightning's own `to` sets it
        return module

    def wrap_objective(self, objective: Objective) -> Objective:
        """Wrap an objective so that the weights that it needs are gathered; all ranks call this together.

        A penalty is a sum over all weights, which no rank has: every rank computes that of its shards here, and its
        gradient in `finish_gradients`.

        Args:
            objective: the loss to minimise.
        """
        self._ranks.any(False)  # reports a lost rank in a sentence, which the devices' own collectives would not
        if not isinstance(objective, PenalizedObjective):
            return lambda module, batch: with_gathered_blocks(module, lambda: dict(objective(module, batch)))

        def with_penalty(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
            losses = with_gathered_blocks(module, lambda: dict(training_step(module, batch)))
            return objective.add_penalty(losses, penalty(objective, module, self._fabric.device))

        return with_penalty

    def groups(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
        """Group parameters for an optimiser, which cannot step sharded and replicated tensors in one group.

        Args:
            parameters: the parameters to train.
        """
        parts, others = split_sharded(parameters)
        return [{"params": some} for some in (parts, others) if some]

    def step(self, optimizer: _FabricOptimizer) -> None:
        """Take an optimiser step.

        Args:
            optimizer: the optimiser of a sharded model.

        Raises:
            UserError: the optimiser uses an operation over whole tensors that torch does not support for sharded ones.
        """
        try:
            optimizer.step()
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error) for word in ("sharding strategy", "placement", "DTensor")):
                raise
            name = type(optimizer.optimizer).__name__
            text = " ".join(str(error).split())[:160]
            raise UserError(
                f"fabric.strategy: fsdp leaves {name} parts of tensors, with which it cannot step as it is set up; "
                f"take another optimizer, e.g. adamw, without fused ({text})"
            ) from error

    def finish_gradients(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], objective: Objective, clip: float | None
    ) -> None:
        """Average the gradients that FSDP does not, add a penalty's, and clip them.

        Args:
            module: the sharded module.
            parameters: its trained parameters.
            objective: the loss to minimise, whose penalty, if it has one, is added.
            clip: largest norm over all gradients; None: they are not clipped.
        """
        average_replicated(parameters, self._ranks)
        if isinstance(objective, PenalizedObjective):
            add_penalty_gradient(objective, module)
        if clip is not None:
            clip_gradients(parameters, clip, self._fabric.device)

    def predict(
        self, module: nn.Module, samples: Samples, what: OutputSelector, batch_size: int, cache: PredictionCache | None
    ) -> Tensor:
        """Predict, each rank for its share of the samples; results are the same on all ranks.

        Args:
            module: the model, sharded or not.
            samples: n samples.
            what: the field of `Output` to collect, or a function of module and inputs.
            batch_size: samples per forward pass.
            cache: looked up first, and filled afterwards; None: no cache.

        Returns:
            float32 on the CPU, [n, …].
        """
        count, total = self._ranks.count, len(samples)
        if total == 0 or not is_sharded(module):
            return predict(self._fabric, module, samples, what, batch_size, cache=cache)
        key = None if cache is None else self._key(cache, module, samples, what, batch_size)
        cached = None if key is None else cache.get(key, total)
        if key is not None and not self._ranks.any(cached is None):
            return cached
        longest = -(-total // count)
        own = torch.arange(self._ranks.index, total, count)
        # the same number on every rank, since all must run each forward pass
        own = torch.cat([own, torch.zeros(longest - len(own), dtype=torch.int64)])
        with full_parameters(module):
            local = predict(self._fabric, module, samples.subset(own), what, batch_size)
        predictions = torch.empty(total, *local.shape[1:])
        for rank, data in enumerate(self._ranks.gather(local.contiguous().view(torch.uint8).numpy().tobytes())):
            received = torch.frombuffer(bytearray(data), dtype=torch.float32).view(longest, *local.shape[1:])
            rows = predictions[rank::count]
            rows.copy_(received[: len(rows)])
        if key is not None:
            cache.put(key, predictions)
        return predictions

    def _key(
        self, cache: PredictionCache, module: nn.Module, samples: Samples, what: Any, batch_size: int
    ) -> str | None:
        """Return a cache key that is the same on all ranks, though each hashes only its shard of the weights."""
        how = (self._precision, self._fabric.device.type, batch_size, "fsdp")
        own = cache.key(module, samples, what, how)
        if own is None:
            return None
        return hashlib.blake2b(b"/".join(self._ranks.gather(own.encode())), digest_size=16).hexdigest()
