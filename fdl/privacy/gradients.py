"""Gradients of single examples, and what has to hold for them to make sense."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fdl.engine.inference import map_tensors
from fdl.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fdl.datamodules.samples import Samples
    from fdl.modules.objectives import Objective
    from fdl.modules.types import Batch

log = logging.getLogger("fdl")

_TOLERANCE = 1e-3
"""Relative difference of losses that rounding may make."""


class PerExampleGradients:
    """The gradient of the objective on every example by itself.

    Each gradient is that of a batch of one, whatever the objective is, so none depends on two examples. They are laid
    into ``grad_sample``, where opacus' `DPOptimizer` looks for them. All examples go through the module side by side;
    where that cannot be (data decide what is computed, activations are computed again), one after another.

    Args:
        module: in training mode.
        objective: what is minimised.
        fabric: gives the precision.
        apart: take one example after another from the first.

    Attributes:
        apart: whether examples are taken one after another.
    """

    def __init__(self, module: nn.Module, objective: Objective, fabric: Fabric, apart: bool = False):
        self._holder, self._fabric, self.apart = _Holder(module, objective), fabric, apart
        self._trained = {name: p for name, p in self._holder.named_parameters() if p.requires_grad}

    def __call__(self, batch: Batch | None, count: int) -> None:
        """Find the gradients of a batch of so many examples; of an empty one (None) there are none."""
        if batch is None:
            found = {name: parameter.new_zeros(0, *parameter.shape) for name, parameter in self._trained.items()}
        else:
            found = None if self.apart else self._together(batch)
            found = found or self._one_by_one(batch, count)
        for name, parameter in self._trained.items():
            parameter.grad_sample = found[name]

    def close(self) -> None:
        """Forget the gradients."""
        for parameter in self._trained.values():
            parameter.grad_sample = parameter.summed_grad = None

    def _together(self, batch: Batch) -> dict[str, Tensor] | None:
        """All at once; None where that cannot be."""
        dims = tuple(None if part is None else map_tensors(part, lambda _: 0) for part in batch)
        weights = {name: parameter.detach() for name, parameter in self._trained.items()}
        before = torch.get_rng_state()
        try:
            return torch.func.vmap(torch.func.grad(self._loss), (None, dims), randomness="different")(weights, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever is wrong with the objective itself will be raised once more
            reason = " ".join(str(error).split())[:200]
            log.info("%s: gradients are found one example after another: %s", _name(self._holder.module), reason)
            torch.set_rng_state(before)
            self.apart = True
        return None

    def _loss(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        one = tuple(None if part is None else map_tensors(part, lambda tensor: tensor.unsqueeze(0)) for part in batch)
        # fused attention has no vectorised form: one call an example
        with self._fabric.autocast(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(self._holder, dict(weights), (one,))

    def _one_by_one(self, batch: Batch, count: int) -> dict[str, Tensor]:
        trained = list(self._trained.values())
        rows = [example_gradients(self._holder, trained, single_example(batch, i), self._fabric) for i in range(count)]
        return {name: torch.stack(column) for name, column in zip(self._trained, zip(*rows))}


class GhostClipping:
    """Sums of clipped gradients without the gradients of single examples (ghost clipping, Li et al., 2022).

    A first pass backwards finds each example's norm by opacus' hooks; a second one, with what the module said of each
    example scaled down, gives the sum of the clipped gradients. Layers for which opacus has no norm, all but linear
    ones and embeddings, still make their own gradients of single examples, one layer at a time.

    Args:
        module: in training mode.
        objective: a mean of losses of single examples, made of one call of the module.
        fabric: gives the precision.
        clip: largest norm.

    Raises:
        UserError: the objective is not made so.
    """

    def __init__(self, module: nn.Module, objective: Objective, fabric: Fabric, clip: float):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self._module, self._objective, self._fabric = module, objective, fabric
        self._hooks = GradSampleModuleFastGradientClipping(
            module, strict=False, max_grad_norm=clip, loss_reduction="mean", use_ghost_clipping=True
        )
        self._hooks.disable_hooks()
        self._outer = module.register_forward_hook(self._scale)
        self._share: Tensor | None = None
        self._calls, self._checked = 0, False

    def __call__(self, batch: Batch | None, count: int) -> None:
        """Write the sum of the clipped gradients into ``grad``.

        Args:
            batch: None for an empty one.
            count: examples in it.
        """
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if batch is None:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            return
        self._calls, self._share = 0, torch.ones(count, device=trained[0].device)
        self._hooks.enable_hooks()
        try:
            with _quiet(), sdpa_kernel(SDPBackend.MATH):  # as in `PerExampleGradients`
                with self._fabric.autocast():
                    loss = self._objective(self._module, batch)["loss"]
                loss.backward(retain_graph=True)
            shares = self._hooks.get_clipping_coef()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, ValueError) as error:
            raise self._unfit(" ".join(str(error).split())[:200]) from error
        finally:
            self._hooks.disable_hooks()
        if self._calls != 1:
            raise self._unfit(f"its loss calls the module {self._calls} times")
        if not self._checked:  # what does not pass through the module's answers would be neither clipped nor covered
            self._backward(loss, torch.zeros_like(shares), trained)
            if any(parameter.grad is not None and parameter.grad.any() for parameter in trained):
                raise self._unfit("its loss looks at weights, too")
            self._checked = True
        self._backward(loss * count, shares, trained, last=True)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def check(self, batch: Batch, count: int) -> None:
        """Compare the loss and the norms of a few examples with those that they have alone.

        A loss that is no plain mean of its examples', one by tokens or with weights of classes, would make an example's
        gradient depend on the others. And opacus takes the first dimension of what a layer sees for the examples: a
        layer that sees something else, tokens of all examples in a row or time first, would be clipped wrongly. So
        everything is tried here once, with all that is random switched off.

        Raises:
            UserError: they differ.
        """
        modes = [(layer, layer.training) for layer in self._module.modules()]
        self._module.eval()
        for layer, _ in modes:  # where hooks are
            layer.training = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        holder = _Holder(self._module, self._objective)
        try:
            self(batch, count)
            said = self._hooks.get_norm_sample()
            self._share = torch.ones(1, device=said.device)
            with _quiet():
                alone = [
                    example_gradients(holder, trained, single_example(batch, i), self._fabric) for i in range(count)
                ]
            with torch.no_grad(), self._fabric.autocast():
                together = float(holder(batch))
                mean = sum(float(holder(single_example(batch, i))) for i in range(count)) / count
        finally:
            for layer, mode in modes:
                layer.training = mode
            for parameter in trained:
                parameter.grad = None
        if abs(together - mean) > _TOLERANCE * (1 + abs(mean)):
            raise self._unfit("its loss is no plain mean of its examples'")
        norms = torch.stack([torch.stack([g.norm() for g in row]).norm() for row in alone])
        if said.shape != norms.shape or not torch.allclose(said.to(norms), norms, rtol=1e-2, atol=1e-6):
            raise self._unfit("its layers do not see one row for each example")

    def close(self) -> None:
        """Take the hooks out again."""
        self._outer.remove()
        self._hooks.cleanup()
        for parameter in self._module.parameters():
            parameter.summed_grad = None
            if hasattr(parameter, "_norm_sample"):
                del parameter._norm_sample

    def _backward(self, loss: Tensor, shares: Tensor, trained: list[nn.Parameter], last: bool = False) -> None:
        for parameter in trained:
            parameter.grad = None
        self._share = shares.detach()
        with _quiet():
            loss.backward(retain_graph=not last)

    def _scale(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Let every example's part of the gradient through by its share."""
        self._calls += 1
        return _mapped(output, lambda tensor: _Scaled.apply(tensor, self) if tensor.requires_grad else tensor)

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"privacy.ghost_clipping: does not fit {_name(self._module)}: {reason}; set it to false")


class _Scaled(torch.autograd.Function):
    """Identity on a module's output that scales its gradient per example in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ghost: GhostClipping) -> Tensor:
        if len(tensor) != len(ghost._share):
            raise ValueError("it answers with tensors that have no row for each example")
        ctx.ghost = ghost
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        share = ctx.ghost._share.to(gradient.dtype)
        return gradient * share.view(-1, *[1] * (gradient.ndim - 1)), None


class _Holder(nn.Module):
    """An objective as the forward pass of a module, whose weights can then be given."""

    def __init__(self, module: nn.Module, objective: Objective):
        super().__init__()
        self.module, self._objective = module, objective

    def forward(self, batch: Batch) -> Tensor:
        return self._objective(self.module, batch)["loss"]


def example_gradients(holder: nn.Module, trained: Sequence[nn.Parameter], batch: Batch, fabric: Fabric) -> list[Tensor]:
    """The gradient of one example.

    Args:
        holder: whose forward pass is the loss of a batch.
        trained: the parameters.
        batch: of one.
        fabric: gives the precision.
    """
    with fabric.autocast():
        loss = holder(batch)
    found = torch.autograd.grad(loss, list(trained), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(trained, found)]


def single_example(batch: Batch, index: int) -> Batch:
    """The batch of one example of a batch."""
    return tuple(
        None if part is None else map_tensors(part, lambda tensor: tensor[index : index + 1]) for part in batch
    )


def check_module(module: nn.Module, name: str = "") -> None:
    """Refuse normalisation over a batch.

    Args:
        module: in training mode; what is frozen is in evaluation mode and harmless.
        name: what to call it, by default its class.

    Raises:
        UserError: naming the layer and what to take instead.
    """
    for where, layer in module.named_modules():
        tracks = isinstance(layer, _InstanceNorm) and layer.track_running_stats
        if layer.training and (isinstance(layer, _BatchNorm) or tracks):
            raise UserError(
                f"privacy: layer {where} of {name or _name(module)} is {type(layer).__name__}, which mixes the "
                "examples of a batch, so that none of them can be clipped by itself; take a model with group "
                "normalisation (GroupNorm) or layer normalisation (LayerNorm)"
            )


def check_objective(module: nn.Module, objective: Objective, samples: Samples, fabric: Fabric, to: Any) -> None:
    """Refuse losses that compare the examples of a batch: alone, an example has none.

    A loss of two examples must lie between those of either, and that of one example twice be that of the example.

    Args:
        module: left in training mode.
        objective: what is minimised.
        samples: two of them are looked at; of less there is nothing to compare.
        fabric: gives the precision.
        to: brings a batch to the device.

    Raises:
        UserError: naming the module.
    """
    if len(samples) < 2:
        return
    module.eval()
    with torch.no_grad(), fabric.autocast():
        rows = ([0], [1], [0, 1], [0, 0])
        losses = [float(objective(module, to(samples.batch(torch.tensor(row))))["loss"]) for row in rows]
    module.train()
    one, other, both, twice = losses
    slack = _TOLERANCE * (1 + max(map(abs, losses)))
    if abs(twice - one) > slack or not min(one, other) - slack <= both <= max(one, other) + slack:
        raise UserError(
            f"privacy: the loss of {_name(module)} compares the examples of a batch (as contrastive losses do), so it "
            "is no mean of losses of single examples, and none of them can be clipped by itself"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back torch's warning that a first layer's inputs have no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook")
        yield


def _mapped(value: Any, function: Any) -> Any:
    """Apply a function to all tensors of an answer: a tensor, or tuples, named tuples and dicts of them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, function) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _name(module: nn.Module) -> str:
    return type(module).__name__
