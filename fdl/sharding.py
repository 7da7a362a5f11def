"""`fabric.strategy: fsdp`: every rank holds a part of every model, and all ranks train and ask all models together.

The ranks run the same program on the same numbers, in the same order, as if each were alone; what they share are the
weights, gradients and optimisers' states of models, and the samples of batches and questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fdl.answer_cache import AnswerCache
from fdl.errors import UserError
from fdl.inference import Question, answer
from fdl.modules.shards import inside, is_sharded, local, shard, whole
from fdl.modules.weights import pin_parts, state_of
from fdl.runtime import Objective, training_step

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fdl.datamodules.samples import Batch, Samples
    from fdl.ranks import Ranks
    from fdl.recipe import Recipe


def require_gpus(recipe: Recipe) -> None:
    """See that a recipe which shards its models finds GPUs for it, before anything is loaded.

    Raises:
        UserError: this machine has none.
    """
    if recipe.fabric.strategy == "fsdp" and not torch.cuda.is_available():
        raise UserError(
            "fabric.strategy: fsdp shards models over GPUs, and torch finds none here; take fabric.strategy=auto or "
            "ddp, where every process has whole models"
        )


class Sharder:
    """Shards models over all ranks, and does with them what takes all ranks.

    Gradients are averaged in 32 bits at least.

    Args:
        fabric: launched, its default process group is that of the devices.
        ranks: the processes.
    """

    def __init__(self, fabric: Fabric, ranks: Ranks):
        self._fabric, self._ranks = fabric, ranks
        self._precision = fabric.strategy.precision.precision
        self._mesh = init_device_mesh(fabric.device.type, (ranks.count,))

    def place(self, module: LightningModule) -> LightningModule:
        """Shard a new module, given in host memory and in the recipe's precision, the same on all ranks."""
        names = list(state_of(module))
        shard(module, self._mesh, torch.bfloat16 if self._precision == "bf16-mixed" else None)
        pin_parts(module, names)
        for part in module.modules():
            if isinstance(part, LightningModule):
                part._device = self._fabric.device  # as Lightning's own `to` notes it
        return module

    def within(self, objective: Objective) -> Objective:
        """The same objective, where it finds the weights that it needs; all ranks begin to train with it together.

        A `penalty` of an objective is a sum over all weights, of which nobody has them: every rank takes that of its
        parts here, and its gradient in `settle`.
        """
        self._ranks.any(False)  # a rank that is gone is told in words here, and not by the devices' own collectives
        if not hasattr(objective, "penalty"):
            return lambda module, batch: inside(module, lambda: dict(objective(module, batch)))

        def held(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
            losses = inside(module, lambda: dict(training_step(module, batch)))
            return objective.held(losses, self._penalty(objective, module))

        return held

    def groups(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
        """Parameters for an optimiser, which cannot step with parts and whole tensors at once."""
        parts, others = _told_apart(parameters)
        return [{"params": some} for some in (parts, others) if some]

    def settle(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], objective: Objective, clip: float | None
    ) -> None:
        """Make the ranks agree on gradients: FSDP has averaged those of parts, here are the others; and clip all.

        Args:
            module: what is trained.
            parameters: its trainable ones.
            objective: what has been differentiated.
            clip: the largest norm of the whole gradient; None: any.
        """
        parts, others = ([p for p in some if p.grad is not None] for some in _told_apart(parameters))
        if others and self._ranks.count > 1:
            self._ranks.sum_gradients(others)
            for p in others:
                p.grad /= self._ranks.count
        if hasattr(objective, "penalty"):
            parts, others = _told_apart(_pull(objective, module))
        if clip is None or not (parts or others):
            return
        squares = _squares([p.grad.to_local() for p in parts], self._fabric.device)
        dist.all_reduce(squares)
        norm = (squares + _squares([p.grad for p in others], self._fabric.device)).sqrt()
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in (*(p.grad.to_local() for p in parts), *(p.grad for p in others)):
            gradient.mul_(factor.to(gradient.dtype))

    def predict(
        self, module: nn.Module, samples: Samples, what: Question, batch_size: int, cache: AnswerCache | None
    ) -> Tensor:
        """Answer samples, each rank its share of them; arguments and result as in `fdl.inference.answer`."""
        count, total = self._ranks.count, len(samples)
        if total == 0 or not is_sharded(module):
            return answer(self._fabric, module, samples, what, batch_size, cache=cache)
        key = None if cache is None else self._key(cache, module, samples, what, batch_size)
        known = None if key is None else cache.get(key, total)
        if key is not None and not self._ranks.any(known is None):
            return known
        longest = -(-total // count)
        own = torch.arange(self._ranks.index, total, count)
        # as many for every rank, since a forward pass takes all of them
        own = torch.cat([own, torch.zeros(longest - len(own), dtype=torch.int64)])
        with whole(module):
            said = answer(self._fabric, module, samples.subset(own), what, batch_size)
        answers = torch.empty(total, *said.shape[1:])
        for rank, data in enumerate(self._ranks.gather(said.contiguous().view(torch.uint8).numpy().tobytes())):
            theirs = torch.frombuffer(bytearray(data), dtype=torch.float32).view(longest, *said.shape[1:])
            rows = answers[rank::count]
            rows.copy_(theirs[: len(rows)])
        if key is not None:
            cache.put(key, answers)
        return answers

    @torch.no_grad()
    def _penalty(self, objective: Any, module: nn.Module) -> Tensor:
        """The penalty of all weights; what every rank has counts once."""
        values = torch.zeros(2, dtype=torch.float64, device=self._fabric.device)
        pairs = list(zip(module.parameters(), objective.anchor))
        for i, spread in enumerate((True, False)):
            some = [(local(p), local(a)) for p, a in pairs if isinstance(p, DTensor) is spread]
            if some:
                values[i] = objective.penalty(*map(list, zip(*some)))
        dist.all_reduce(values[:1])
        return values.sum()

    def _key(self, cache: AnswerCache, module: nn.Module, samples: Samples, what: Any, batch_size: int) -> str | None:
        """A name for an answer that all ranks agree on, though each knows only its part of the weights."""
        how = (self._precision, self._fabric.device.type, batch_size, "fsdp")
        own = cache.key(module, samples, what, how)
        if own is None:
            return None
        return hashlib.blake2b(b"/".join(self._ranks.gather(own.encode())), digest_size=16).hexdigest()


def _pull(objective: Any, module: nn.Module) -> list[nn.Parameter]:
    """Add a penalty's gradient to those of a module, and return all parameters that have any."""
    own = list(module.parameters())
    leaves = [local(p).detach().requires_grad_() for p in own]
    pulls = torch.autograd.grad(objective.penalty(leaves, [local(a) for a in objective.anchor]), leaves)
    trained = [(p, pull) for p, pull in zip(own, pulls) if p.requires_grad]
    for p, pull in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        local(p.grad).add_(pull)
    return [p for p, _ in trained]


def _told_apart(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that are spread over ranks, and the others."""
    parts = [p for p in parameters if isinstance(p, DTensor)]
    return parts, [p for p in parameters if not isinstance(p, DTensor)]


def _squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of all squares, float64 on a device."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in torch._foreach_norm(list(gradients))]).square().sum()
