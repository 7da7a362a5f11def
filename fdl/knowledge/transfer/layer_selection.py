"""Selection of layers by the alignment with a target per transmitted byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.transfer.extraction import Extracted, Moments, extract
from fdl.participants import Client
from fdl.utils.arguments import at_least, one_of

_FEWEST = 4
"""Samples that the estimate without bias needs at least."""


class LayerSelection:
    """Each client sends, of its candidate layers, those that tell most for their bytes.

    What the layers tell is their alignment with a target, the linear CKA of all chosen layers side by side, which is
    what the server sees of them. Layers are added one by one, always the one that raises the alignment most for each
    number that it sends for a sample, as long as it fits the budget and raises it at all; a single layer that alone
    does better than all of these takes their place. So a layer that only repeats what a cheaper one says is left out.
    The choice is made anew every round, from nothing but the client's own model and data, and without chance.

    Sources: Kornblith et al., "Similarity of Neural Network Representations Revisited" (CKA); Song et al., "Feature
    Selection via Dependence Maximization" (the estimate without bias, without which wide layers look better than they
    are); Khuller et al., "The Budgeted Maximum Coverage Problem" (greedy choice under a budget, or the best one).

    Args:
        budget: most numbers that are sent for a sample, all layers together.
        toward: the target: the classes of the client's held-out private samples, or its own answers to the proxy set,
            which are also taken where it holds fewer than four such samples, or of one class only.
    """

    name = "layer_selection"

    def __init__(self, budget: int = 64, toward: Literal["answers", "labels"] = "answers"):
        self.budget, self.toward = at_least("budget", budget, 1), one_of("toward", toward, ("answers", "labels"))

    def choose(self, client: Client, extracted: Extracted, widths: Mapping[str, int]) -> list[str]:
        """The layers that a client sends.

        Args:
            client: whose metrics note the alignment of each candidate, and of those that were chosen together.
            extracted: the candidates, and the answers, on the whole proxy set.
            widths: by candidate, how many numbers it sends for a sample.

        Returns:
            At least one name, in the order of the candidates.

        Raises:
            UserError: not even the narrowest candidate fits the budget.
        """
        layers, target = self._measured(client, extracted)
        try:
            chosen, scores = select(layers, target, widths, self.budget)
        except ValueError as error:
            raise UserError(f"features, client {client.id}: {error}") from error
        client.metrics.update({f"features/alignment/{name}": score for name, score in scores.items()})
        client.metrics["features/columns"] = float(sum(widths[name] for name in chosen))
        return chosen

    def _measured(self, client: Client, extracted: Extracted) -> tuple[Mapping[str, Tensor], Tensor]:
        """The layers and the target on the samples on which they are compared."""
        labels = client.calibration.labels if self.toward == "labels" else None
        if labels is not None and len(labels) >= _FEWEST and len(labels.unique()) > 1:
            held_out = extract(client, client.specialist(), client.calibration, list(extracted.layers))
            return held_out.layers, torch.nn.functional.one_hot(labels, client.num_classes)
        return extracted.layers, torch.softmax(extracted.logits, dim=1)


def select(
    layers: Mapping[str, Tensor], target: Tensor, widths: Mapping[str, int], budget: int
) -> tuple[list[str], dict[str, float]]:
    """Choose layers by the greedy rule of `LayerSelection`.

    Args:
        layers: by name, [n, d], not standardised.
        target: [n, e].
        widths: by name, the cost.
        budget: most cost together.

    Returns:
        The chosen names in the order of `layers`, and the alignment of every single layer.

    Raises:
        ValueError: none fits.
    """
    names = list(layers)
    fits = [i for i, name in enumerate(names) if widths[name] <= budget]
    if not fits:
        narrowest = min(names, key=widths.__getitem__)
        raise ValueError(
            f"no layer fits a budget of {budget} numbers; the narrowest, {narrowest}, has {widths[narrowest]}"
        )
    sides = [Moments.of(values).standardize(values) for values in layers.values()]
    between = torch.tensor([[dependence(a, b) for b in sides] for a in sides], dtype=torch.float64)
    to_target = torch.tensor([dependence(side, target) for side in sides], dtype=torch.float64)
    own = dependence(target, target)

    def alignment(chosen: list[int]) -> float:
        # layers side by side have the sum of their Gram matrices, and dependence is linear in either
        scale = float(between[chosen][:, chosen].sum()) * own
        return float(to_target[chosen].sum()) / scale**0.5 if scale > 0 else 0.0

    alone = [alignment([i]) for i in range(len(names))]
    chosen, reached, left = [], 0.0, budget
    while True:
        open_ = [i for i in fits if i not in chosen and widths[names[i]] <= left]
        gains = {i: (alignment([*chosen, i]) - reached) / widths[names[i]] for i in open_}
        best = max(gains, key=gains.__getitem__, default=None)  # of equals the first
        if best is None or gains[best] <= 0:
            break
        chosen.append(best)
        reached, left = alignment(chosen), left - widths[names[best]]
    single = max(fits, key=alone.__getitem__)
    if not chosen or alone[single] > reached:
        chosen = [single]
    return [names[i] for i in sorted(chosen)], dict(zip(names, alone))


def dependence(x: Tensor, y: Tensor) -> float:
    """The Hilbert-Schmidt independence criterion of linear kernels, estimated without bias.

    With the Gram matrices K = XXᵀ and L = YYᵀ, whose diagonals are set to 0:
    ``(tr KL + 1ᵀK1·1ᵀL1 / ((n−1)(n−2)) − 2/(n−2)·1ᵀKL1) / (n(n−3))``, computed without an n × n matrix.
    Source: Song et al., "Feature Selection via Dependence Maximization", equation 5.

    Args:
        x: X, [n, d], n ≥ 4.
        y: Y, [n, e].
    """
    n = len(x)
    x, y = (side.double() - side.double().mean(0) for side in (x, y))  # moves neither side, and keeps digits
    k, m = x.square().sum(1), y.square().sum(1)  # the diagonals
    row_k, row_m = x @ x.sum(0) - k, y @ y.sum(0) - m  # K1 and L1
    trace = (x.T @ y).square().sum() - k @ m
    sums = row_k.sum() * row_m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (row_k @ row_m)
    return float((trace + sums) / (n * (n - 3)))
