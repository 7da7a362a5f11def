"""`fabric.strategy: fsdp`: every rank holds a part of every model, and all ranks train and ask all models together.

The ranks run the same program on the same numbers, in the same order, as if each were alone; what they share are the
weights, gradients and optimisers' states of models, and the samples of batches and questions.
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
    clip_all,
    penalty,
    split_sharded,
)
from fdl.engine.inference import OutputSelector, predict
from fdl.engine.prediction_cache import PredictionCache
from fdl.errors import UserError
from fdl.modules.objectives import Objective, PenalizedObjective, training_step
from fdl.state.sharded_handle import ShardedModelHandle
from fdl.state.shards import gathered, is_sharded, shard, with_gathered_blocks
from fdl.state.weights import module_state

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricOptimizer

    from fdl.datamodules.samples import Samples
    from fdl.engine.distributed.process_group import ProcessGroup
    from fdl.modules.types import Batch


class Sharder:
    """Shards models over all ranks, and does with them what takes all ranks.

    Gradients are averaged in 32 bits at least.

    Args:
        fabric: launched, its default process group is that of the devices.
        ranks: the processes.
    """

    def __init__(self, fabric: Fabric, ranks: ProcessGroup):
        self._fabric, self._ranks = fabric, ranks
        self._precision = fabric.strategy.precision.precision
        self._mesh = init_device_mesh(fabric.device.type, (ranks.count,))

    def place(self, module: LightningModule) -> LightningModule:
        """Shard a new module, given in host memory and in the recipe's precision, the same on all ranks."""
        names = list(module_state(module))
        shard(module, self._mesh, torch.bfloat16 if self._precision == "bf16-mixed" else None)
        ShardedModelHandle(module, names)
        for part in module.modules():
            if isinstance(part, LightningModule):
                part._device = self._fabric.device  # as Lightning's own `to` notes it
        return module

    def wrap_objective(self, objective: Objective) -> Objective:
        """The same objective, where it finds the weights that it needs; all ranks begin to train with it together.

        A `penalty` of an objective is a sum over all weights, of which nobody has them: every rank takes that of its
        parts here, and its gradient in `finish_gradients`.
        """
        self._ranks.any(False)  # a rank that is gone is told in words here, and not by the devices' own collectives
        if not isinstance(objective, PenalizedObjective):
            return lambda module, batch: with_gathered_blocks(module, lambda: dict(objective(module, batch)))

        def held(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
            losses = with_gathered_blocks(module, lambda: dict(training_step(module, batch)))
            return objective.add_penalty(losses, penalty(objective, module, self._fabric.device))

        return held

    def groups(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
        """Parameters for an optimiser, which cannot step with parts and whole tensors at once."""
        parts, others = split_sharded(parameters)
        return [{"params": some} for some in (parts, others) if some]

    def step(self, optimizer: _FabricOptimizer) -> None:
        """Let an optimiser step.

        Raises:
            UserError: it looks at more of a tensor than a rank has, in a way that torch does not know.
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
        """Make the ranks agree on gradients, and clip them; arguments as in `sharded_gradients`."""
        average_replicated(parameters, self._ranks)
        if isinstance(objective, PenalizedObjective):
            add_penalty_gradient(objective, module)
        if clip is not None:
            clip_all(parameters, clip, self._fabric.device)

    def predict(
        self, module: nn.Module, samples: Samples, what: OutputSelector, batch_size: int, cache: PredictionCache | None
    ) -> Tensor:
        """Answer samples, each rank its share of them; arguments and result as in `fdl.engine.inference.predict`."""
        count, total = self._ranks.count, len(samples)
        if total == 0 or not is_sharded(module):
            return predict(self._fabric, module, samples, what, batch_size, cache=cache)
        key = None if cache is None else self._key(cache, module, samples, what, batch_size)
        known = None if key is None else cache.get(key, total)
        if key is not None and not self._ranks.any(known is None):
            return known
        longest = -(-total // count)
        own = torch.arange(self._ranks.index, total, count)
        # as many for every rank, since a forward pass takes all of them
        own = torch.cat([own, torch.zeros(longest - len(own), dtype=torch.int64)])
        with gathered(module):
            said = predict(self._fabric, module, samples.subset(own), what, batch_size)
        answers = torch.empty(total, *said.shape[1:])
        for rank, data in enumerate(self._ranks.gather(said.contiguous().view(torch.uint8).numpy().tobytes())):
            theirs = torch.frombuffer(bytearray(data), dtype=torch.float32).view(longest, *said.shape[1:])
            rows = answers[rank::count]
            rows.copy_(theirs[: len(rows)])
        if key is not None:
            cache.put(key, answers)
        return answers

    def _key(
        self, cache: PredictionCache, module: nn.Module, samples: Samples, what: Any, batch_size: int
    ) -> str | None:
        """A name for an answer that all ranks agree on, though each knows only its part of the weights."""
        how = (self._precision, self._fabric.device.type, batch_size, "fsdp")
        own = cache.key(module, samples, what, how)
        if own is None:
            return None
        return hashlib.blake2b(b"/".join(self._ranks.gather(own.encode())), digest_size=16).hexdigest()
