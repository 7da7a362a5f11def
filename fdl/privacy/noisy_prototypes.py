"""Prototypes and counts with noise: differential privacy of each private sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fdl.knowledge.confidence.base import public_space
from fdl.knowledge.transfer.extraction import Extracted
from fdl.knowledge.transfer.prototypes import PrototypeTransfer
from fdl.messages import Prototypes
from fdl.participants import Client
from fdl.privacy.accounting import event, spend
from fdl.privacy.release import add_noise, clip_rows, spend_or_refuse
from fdl.utils.arguments import positive


class NoisyPrototypes(PrototypeTransfer):
    """One prototype per class, of which the client, whom nobody needs to trust further, adds noise to sum and count.

    A sample's embedding in the public space is clipped to L2 norm S. Of every class go up the sum of embeddings and the
    number of samples. One sample more or less moves the sum of one class by S at most and its count by 1, so in units
    of S and 1 both together by √2: the noise has standard deviation z√2·S and z√2. A prototype is the noisy sum over
    the noisy count, brought back to norm S; a class whose noisy count is less than the noise is left out.

    The same data are paid for once: what was sent is sent again, until others arrive. How sure a specialist is of its
    own samples is not sent. What is protected is a sample, not an institution, and only where specialists are trained
    with DP-SGD: the answers of others give away their samples, and the account says so.

    Args:
        noise_multiplier: z, noise over sensitivity; > 0.
        clip: S, > 0; None for the median norm of the proxy set's embeddings, which are public.
        loss: as of plain prototypes.
        weight: likewise.
        temperature: likewise.
    """

    name = "noisy_prototypes"

    def __init__(
        self,
        noise_multiplier: float,
        clip: float | None = None,
        loss: Literal["infonce", "mse"] = "infonce",
        weight: float = 0.1,
        temperature: float = 0.1,
    ):
        super().__init__(count=1, loss=loss, weight=weight, temperature=temperature)
        self.noise_multiplier = positive("noise_multiplier", noise_multiplier)
        self.clip = None if clip is None else positive("clip", clip)

    def message(self, client: Client, private: Callable[[], Extracted], proxy: Extracted) -> Prototypes:
        """Build a client's noisy prototypes; arguments as of the overridden method."""
        if client.dp_sgd is None:  # the answers that go with them, of a specialist that was trained without noise
            spend(client, event("responses", 0.0))
        held = client.state.get("prototypes")
        if held is None or held["stage"] != client.stage:
            if spend_or_refuse(client, event(self.name, self.noise_multiplier)):
                held = {"stage": client.stage, **self._drawn(client)}
            elif held is None:
                none = torch.zeros(0, dtype=torch.int64)
                width = public_space(client).encode_public(client.proxy).shape[1]
                held = {"stage": client.stage, "values": torch.zeros(0, width), "labels": none, "counts": none}
            client.state["prototypes"] = held
        return Prototypes(held["values"], held["labels"], held["counts"])

    def _drawn(self, client: Client) -> dict[str, Tensor]:
        """Noisy prototypes of the data that are there now."""
        space = public_space(client)
        public = torch.tensor(space.encode_public(client.proxy), dtype=torch.float32)
        clip = float(torch.linalg.vector_norm(public, dim=1).median()) if self.clip is None else self.clip
        own, labels = torch.zeros(0, public.shape[1]), torch.zeros(0, dtype=torch.int64)
        if len(client.train):
            with client.data_gate.open():
                own, labels = torch.tensor(space.encode(client.train), dtype=torch.float32), client.train.labels
        sums, counts = class_sums(own, labels, client.num_classes, clip)
        deviation, stream = self.noise_multiplier * math.sqrt(2), client.noise("prototypes")
        sums, counts = add_noise(sums, deviation * clip, stream), add_noise(counts, deviation, stream)
        labels = torch.nonzero(counts >= max(deviation, 1.0)).squeeze(1)
        means = clip_rows(sums[labels] / counts[labels].unsqueeze(1), clip)
        return {"values": means, "labels": labels, "counts": counts[labels].round().long()}


def class_sums(points: Tensor, labels: Tensor, classes: int, clip: float) -> tuple[Tensor, Tensor]:
    """Of each class the sum of its points, clipped to an L2 norm, and their number.

    Args:
        points: float32 [n, d].
        labels: int64 [n].
        classes: C.
        clip: the norm.

    Returns:
        float32 [C, d] and [C].
    """
    sums = torch.zeros(classes, points.shape[1]).index_add_(0, labels, clip_rows(points, clip))
    return sums, torch.bincount(labels, minlength=classes).float()
