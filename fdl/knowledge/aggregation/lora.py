"""Aggregation of the low-rank updates (LoRA) of several clients, layer by layer.

A layer computes (W + s B A) x with B [out, r], A [r, in] and s = α / r. With shares p_k that sum to 1 the clients'
mean update is s Σ p_k B_k A_k. The product of the means is another matrix: for B A = 1 · 1 at one client and
(−1) · (−1) at the other it is 0, and the mean is 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdl.errors import UserError

Factors = tuple[Tensor, Tensor]
"""Left [out, R] and right [R, in]: the matrix left · right."""


@dataclass(frozen=True)
class Adapted:
    """One layer with a low-rank update, as `apply_tuning` makes it.

    Attributes:
        name: its dotted name in the module.
        layer: peft's layer around the original one.
    """

    name: str
    layer: nn.Module

    @property
    def a(self) -> str:
        """The name of A in the module's state."""
        return f"{self.name}.lora_A.default.weight"

    @property
    def b(self) -> str:
        """The name of B in the module's state."""
        return f"{self.name}.lora_B.default.weight"

    @property
    def scale(self) -> float:
        """The factor s = α / r."""
        return self.layer.scaling["default"]

    @property
    def weight(self) -> Tensor:
        """The original layer's W, [out, in]: a view, also of GPT-2's layers, which hold it transposed."""
        weight = self.layer.get_base_layer().weight.detach()
        return weight.T if self.layer.fan_in_fan_out else weight


def low_rank_layers(module: nn.Module) -> list[Adapted]:
    """The layers of a module that have low-rank updates.

    Args:
        module: a model tuned by LoRA.

    Raises:
        UserError: the module has no such layers.
    """
    found = [
        Adapted(name, layer)
        for name, layer in module.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer")
    ]
    if not found:
        raise UserError("the student has no low-rank updates to aggregate; set student.args.tuning: lora")
    return found


def merged(module: nn.Module, updates: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with dense updates added to its original weights.

    A copy, since original weights are public and shared by the clients that are trained concurrently.

    Args:
        module: a model with low-rank updates, left unchanged. Frozen parameters without update are shared with the
            copy.
        updates: dense updates [out, in] by layer; if empty the module itself is returned.
    """
    if not updates:
        return module
    own = {id(layer.layer.get_base_layer().weight) for layer in low_rank_layers(module) if layer.name in updates}
    shared = {id(p): p for p in module.parameters() if not p.requires_grad and id(p) not in own}
    copied = copy.deepcopy(module, shared)
    for layer in low_rank_layers(copied):
        if layer.name in updates:
            layer.weight.copy_(layer.weight + updates[layer.name].to(layer.weight.device))
    return copied


@dataclass(frozen=True)
class LayerResult:
    """Aggregation result of one layer.

    Attributes:
        factors: the new B [out, r] and A [r, in].
        update: factors of the update of the original weight, scaled by s; None if the weight is unchanged.
    """

    factors: Factors
    update: Factors | None = None


class LoraAggregation:
    """Aggregation of several low-rank updates into one; the base class averages A and B.

    Attributes:
        stacks: True if it needs every client's matrices, not just their means.
        merges: True if the original weights change, so that the update must be downloaded by every client.
        fresh: True if clients begin every round with new matrices, so that B and A need not be downloaded.
        trains_a: whether A has to be trained; None for either.
    """

    stacks = False
    merges = False
    fresh = False
    trains_a: bool | None = True

    def check(self, layers: Sequence[Adapted], state: Mapping[str, Tensor]) -> None:
        """Require that the student's matrices are trained as this aggregation needs it.

        Args:
            layers: the student's layers with low-rank updates.
            state: the tensors of the student that are exchanged, by name.

        Raises:
            UserError: A is trained and must not be, or the other way round.
        """
        if self.trains_a is not None and any((layer.a in state) != self.trains_a for layer in layers):
            why = "averages B alone" if self.trains_a is False else "needs A to be trained as well"
            wanted = str(not self.trains_a).lower()
            raise UserError(f"aggregation {self.name} {why}: set student.args.lora.freeze_a: {wanted}")

    def combine(self, factors: Sequence[Factors], shares: Sequence[float], mean: Factors, scale: float) -> LayerResult:
        """Combine the clients' matrices of one layer.

        Args:
            factors: (B_k, A_k) of each client.
            shares: p_k of each client; they sum to 1.
            mean: means of B and of A.
            scale: the factor s.
        """
        return LayerResult(mean)


class FedIT(LoraAggregation):
    """Average A and B separately: s mean(B) mean(A), which is not the clients' mean update (Zhang et al., 2024)."""

    name = "fedit"
    trains_a = None


class FFA(LoraAggregation):
    """Average B alone, with an A that never changes and is the same everywhere: exact (FFA-LoRA, Sun et al., 2024)."""

    name = "ffa"
    trains_a = False


class FLoRA(LoraAggregation):
    """Stack the clients' matrices, which is exact, add the product to W, and reinitialise them (Wang et al., 2024).

    A download carries the stack, [out, K r] and [K r, in] per layer for K clients.
    """

    name = "flora"
    stacks = True
    merges = True
    fresh = True

    def combine(self, factors: Sequence[Factors], shares: Sequence[float], mean: Factors, scale: float) -> LayerResult:
        """Add [B_1 … B_K] [s p_1 A_1; …; s p_K A_K] to W, and reset B to 0."""
        left = torch.cat([b for b, _ in factors], dim=1)
        right = torch.cat([scale * share * a for (_, a), share in zip(factors, shares)])
        return LayerResult((torch.zeros_like(mean[0]), mean[1]), (left, right))


class FedEx(LoraAggregation):
    """Average A and B separately and add the residual to W, which is exact (FedEx-LoRA, Singhal et al., 2025).

    A download carries the averages and the residual as factors of rank (K − 1) r.
    """

    name = "fedex"
    stacks = True
    merges = True

    def combine(self, factors: Sequence[Factors], shares: Sequence[float], mean: Factors, scale: float) -> LayerResult:
        """Add s (mean(B A) − mean(B) mean(A)) = s Σ p_k (B_k − mean(B)) (A_k − C) to W, for any C.

        The weighted deviations of B sum to 0, so that C is free: the last client's A makes the last term vanish.
        """
        *others, (_, last) = factors
        if not others:
            return LayerResult(mean)
        left = torch.cat([scale * share * (b - mean[0]) for (b, _), share in zip(others, shares)], dim=1)
        return LayerResult(mean, (left, torch.cat([a - last for _, a in others])))


class FlexLoRA(LoraAggregation):
    """Approximate the clients' mean update by rank r; exact if its rank is no higher (FlexLoRA, Bai et al., 2024)."""

    name = "flexlora"
    stacks = True

    def combine(self, factors: Sequence[Factors], shares: Sequence[float], mean: Factors, scale: float) -> LayerResult:
        """Decompose Σ p_k B_k A_k ≈ (U S) Vᵀ by QR of the stacked factors, without materialising [out, in].

        B takes the singular values: a direction without weight then has B = 0 as at LoRA's start, and is still learnt.
        """
        left = torch.cat([share * b.double() for (b, _), share in zip(factors, shares)], dim=1)
        right = torch.cat([a.double() for _, a in factors])
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        b, a = torch.zeros_like(mean[0]), torch.zeros_like(mean[1])
        rank = min(b.shape[1], len(s))
        b[:, :rank] = (q_left @ (u * s)[:, :rank]).to(b.dtype)
        a[:rank] = (vh[:rank] @ q_right.T).to(a.dtype)
        return LayerResult((b, a))
