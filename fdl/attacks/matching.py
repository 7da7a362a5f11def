"""Gradient matching: reconstruction of images from observed gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fdl.modules.features import last_layer
from fdl.modules.objectives import training_step

if TYPE_CHECKING:
    from fdl.attacks.image_quality import Scale

MATCHINGS = ("cosine", "l2", "analytic")
"""Objectives: the angle or the distance of gradients, or a closed-form solution."""


@dataclass(frozen=True)
class Search:
    """Optimisation of images such that their gradients match a target.

    Attributes:
        matching: ``"cosine"`` as Geiping et al.: 1 − cos of all gradients as one vector, plus total variation, by Adam
            on the signs of its gradients, with images clamped to the range of pixels. ``"l2"`` as DLG: squared
            distance, here divided by the target's squared norm, by L-BFGS.
        steps: iterations.
        lr: Adam's learning rate, in standard deviations of the data; it falls to a tenth after 3/8, 5/8 and 7/8.
        tv: weight of total variation.
    """

    matching: str
    steps: int
    lr: float
    tv: float

    def __call__(
        self, model: nn.Module, target: Mapping[str, Tensor], labels: Tensor, scale: Scale, stream: torch.Generator
    ) -> tuple[Tensor, float]:
        """Optimise a batch from one random start.

        Args:
            model: the model, in the mode in which the gradients were computed.
            target: observed gradients by parameter name.
            labels: labels of the images, int64 [B].
            scale: shape and range of the images.
            stream: random generator of the start.

        Returns:
            Normalised images, [B, C, H, W], and the final value of the objective.
        """
        device = labels.device
        low, high = scale.low.to(device), scale.high.to(device)
        start = torch.randn(len(labels), *scale.shape, generator=stream)
        x = start.to(device).requires_grad_()
        square = sum(g.square().sum() for g in target.values()).clamp_min(1e-30)

        def objective() -> Tensor:
            found = gradients(model, target, x, labels, graph=True)
            if self.matching == "l2":
                distance = sum((g - target[name]).square().sum() for name, g in found.items()) / square
            else:
                along = sum((g * target[name]).sum() for name, g in found.items())
                own = sum(g.square().sum() for g in found.values()).clamp_min(1e-30)
                distance = 1 - along / (own * square).sqrt()
            return distance + self.tv * total_variation(x) if self.tv else distance

        (self._by_lbfgs if self.matching == "l2" else self._by_signs)(x, objective, low, high)
        with torch.no_grad():
            x.clamp_(low, high)
        return x.detach(), float(objective().detach())

    def _by_lbfgs(self, x: Tensor, objective: Callable[[], Tensor], low: Tensor, high: Tensor) -> None:
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=self.steps,
            history_size=50,
            tolerance_grad=1e-12,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss = objective()
            (x.grad,) = torch.autograd.grad(loss, x)
            return loss.detach()

        optimizer.step(closure)
        x.data.nan_to_num_()

    def _by_signs(self, x: Tensor, objective: Callable[[], Tensor], low: Tensor, high: Tensor) -> None:
        optimizer = torch.optim.Adam([x], lr=self.lr)
        falls = [self.steps * part // 8 for part in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)
        for _ in range(self.steps):
            (slope,) = torch.autograd.grad(objective(), x)
            x.grad = slope.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(low, high)


def set_training_mode(model: nn.Module) -> nn.Module:
    """Put a model into training mode, except for dropout, whose draws an attacker does not know.

    Args:
        model: the model.

    Returns:
        The same model.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def gradients(
    model: nn.Module, names: Mapping[str, object], x: Tensor, labels: Tensor, graph: bool = False
) -> dict[str, Tensor]:
    """Compute the gradients of the model's own loss on one batch.

    Args:
        model: the model, whose `training_step` returns the loss.
        names: mapping whose keys are the names of the parameters.
        x: images, [B, C, H, W].
        labels: their labels, int64 [B].
        graph: True to allow differentiating the gradients.

    Returns:
        Gradients by parameter name.
    """
    own = dict(model.named_parameters())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others cannot be differentiated twice
        loss = training_step(model, (x, labels))["loss"]
        found = torch.autograd.grad(
            loss, [own[name] for name in names], create_graph=graph, allow_unused=True, materialize_grads=True
        )
    return dict(zip(names, found))


def solve_analytically(model: nn.Module, target: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """Solve for the image of a batch of one, from the gradients of a first layer that is linear with a bias.

    ∂L/∂W_i = ∂L/∂b_i · x holds for every output i; x is the least-squares solution over all outputs, exact for a batch
    of one image, and a weighted mean of the images of a larger batch.

    Args:
        model: the model.
        target: observed gradients by parameter name.
        shape: (C, H, W) of an image.

    Returns:
        The normalised image, [1, C, H, W], zeros if no output has a gradient. None if gradients of a linear first layer
        with a bias were not observed.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features == math.prod(shape):
            weight, bias = target.get(f"{name}.weight"), target.get(f"{name}.bias")
            if weight is not None and bias is not None:
                weight, bias = weight.double(), bias.double()
                x = (bias @ weight) / bias.square().sum()
                return torch.nan_to_num(x, 0.0, 0.0, 0.0).float().reshape(1, *shape)
    return None


def infer_labels(model: nn.Module, target: Mapping[str, Tensor], count: int, classes: int) -> Tensor | None:
    """Infer the labels of a batch from the gradients of the classification layer.

    For cross entropy, the bias's gradient is the mean of p − onehot: for one image it is negative at the label only
    (iDLG, Zhao et al., 2020). For several images, labels are inferred greedily where it is smallest, each time adding
    the contribution of one label (after LLG, Wainakh et al., 2022). For a layer without bias, the sums of its weights'
    gradients have the same signs, if the embedding is not negative.

    Args:
        model: the model.
        target: observed gradients by parameter name.
        count: number of labels, the batch size.
        classes: number of classes.

    Returns:
        Labels, int64 [count]; None if gradients of that layer were not observed.
    """
    name = last_layer(model, classes)
    weight, bias = target.get(f"{name}.weight"), target.get(f"{name}.bias")
    if bias is None and weight is None:
        return None
    slope = (weight.flatten(1).sum(1) if bias is None else bias).double().clone()
    each = 1.0 / count if bias is not None else float(slope.clamp_max(0).sum().abs()) / count
    labels = []
    for _ in range(count):
        labels.append(int(slope.argmin()))
        slope[labels[-1]] += each
    return torch.tensor(labels, dtype=torch.int64)


def total_variation(x: Tensor) -> Tensor:
    """Compute the mean absolute difference of vertically plus that of horizontally neighbouring pixels.

    Args:
        x: images, [..., H, W].

    Returns:
        A scalar.
    """
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
