"""Images whose gradients are those that somebody saw."""

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
"""How images are sought: by the angle or the distance of gradients, or by a formula."""


@dataclass(frozen=True)
class Search:
    """How images are sought.

    Attributes:
        matching: ``"cosine"`` as Geiping et al.: 1 − cos of all gradients as one vector, plus total variation, by Adam
            on the signs of its gradients, with images held in the range of pixels. ``"l2"`` as DLG: squared distance,
            here over the target's squared norm, by L-BFGS.
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
        """Look for a batch from one random start.

        Args:
            model: in the mode in which the gradients are taken.
            target: gradients by name.
            labels: of the images, int64 [B].
            scale: shape and range of the images.
            stream: of the start.

        Returns:
            Normalised images [B, C, H, W], and how far their gradients are from the target's.
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


def ready(model: nn.Module) -> nn.Module:
    """Put a model into the mode of its training, but for dropout, whose draws nobody knows."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def gradients(
    model: nn.Module, names: Mapping[str, object], x: Tensor, labels: Tensor, graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of the model's own loss of one batch.

    Args:
        model: gives the loss by its `training_step`.
        names: of the parameters, in any mapping.
        x: images [B, C, H, W].
        labels: int64 [B].
        graph: whether they are to be differentiated again.
    """
    own = dict(model.named_parameters())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others cannot be differentiated twice
        loss = training_step(model, (x, labels))["loss"]
        found = torch.autograd.grad(
            loss, [own[name] for name in names], create_graph=graph, allow_unused=True, materialize_grads=True
        )
    return dict(zip(names, found))


def analytic(model: nn.Module, target: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """The image of a batch of one, from the gradients of a first layer that is linear with a bias.

    ∂L/∂W_i = ∂L/∂b_i · x holds for every output i; x is the least-squares solution of all, exact where one image made
    the gradients, and a weighted mean of images where several did.

    Returns:
        Normalised [1, C, H, W]; zeros where no output had a gradient. None where no such layer's gradients are seen.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features == math.prod(shape):
            weight, bias = target.get(f"{name}.weight"), target.get(f"{name}.bias")
            if weight is not None and bias is not None:
                weight, bias = weight.double(), bias.double()
                x = (bias @ weight) / bias.square().sum()
                return torch.nan_to_num(x, 0.0, 0.0, 0.0).float().reshape(1, *shape)
    return None


def inferred_labels(model: nn.Module, target: Mapping[str, Tensor], count: int, classes: int) -> Tensor | None:
    """Labels of a batch, from the gradients of the classification layer.

    Of cross entropy, the bias's gradient is the mean of p − onehot: for one image it is negative at the label alone
    (iDLG, Zhao et al., 2020). For several, labels are taken one after another where it is least, each time adding what
    one label takes off (after LLG, Wainakh et al., 2022). A layer without bias shows it in the sums of its weights'
    gradients, if the embedding is not negative.

    Returns:
        int64 [count]; None where the gradients of that layer are not seen.
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
    """Mean absolute difference of neighbouring pixels, of rows plus of columns."""
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
