"""Confidence of a dual encoder's predictions of public pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdl.datamodules.samples import Samples
from fdl.knowledge.confidence.base import Confidence
from fdl.knowledge.transfer.embeddings import PAIRS_PER_BLOCK, answers, logit_blocks
from fdl.messages import QuantizedLogWeights
from fdl.metrics.retrieval import captions
from fdl.modules.types import Batch
from fdl.participants import Client
from fdl.utils.arguments import positive


class PairConfidence(Confidence):
    """Weight by the probability that a pair's image and text match each other among the public pairs of a block.

    Both ways, image to text and text to image, are averaged in logarithms and normalised again. Pairs with the same
    caption count as one another's match. The public pairs are looked at in blocks of at most 256.

    Args:
        power: a in ``p^a``; > 0. Large values leave the surest client alone.
    """

    name = "own_pair"

    def __init__(self, power: float = 1.0):
        self.power = positive("power", power)

    def score(self, client: Any, logits: Tensor) -> Tensor:
        """``a · log p``, where column 0 of the logits stands for the match."""
        return self.power * torch.log_softmax(logits, dim=1)[:, 0]


def confidences(confidence: Confidence, client: Client, given: Tensor) -> QuantizedLogWeights:
    """Measure a client's confidence in its predictions of the public pairs.

    Any confidence serves: as logits it is shown a row's similarities to the pairs of its block, the mean of both ways,
    with the match, all pairs with the same caption, in column 0; as samples, images alone.

    Args:
        confidence: the recipe's.
        client: whose answers these are.
        given: its answers, [n, 2 D], as `answers` gives them.
    """
    view = _PairView(client)
    return QuantizedLogWeights.quantize(confidence.log_weights(view, view.logits(given, client.proxy)))


class _PairView:
    """View of a client with pairs: its images, and retrieval among a block's pairs instead of classes."""

    def __init__(self, client: Client):
        self.client, self.samples, self.cache, self.encoder = client, client.samples, client.cache, client.encoder
        self.train, self.calibration = ImagesOfPairs(client.train), ImagesOfPairs(client.calibration)
        self.proxy = ImagesOfPairs(client.proxy)
        self.num_classes = max(min(PAIRS_PER_BLOCK, len(client.calibration)), 2)

    def calibration_accuracy(self) -> float:
        """Accuracy of retrieving the text of a held-out image; chance without held-out pairs."""
        if len(self.calibration) < 2:
            return 1 / self.num_classes
        given = answers(self.client, self.client.specialist(), self.client.calibration)
        found = [(block.argmax(1) == torch.arange(len(block))).float() for block in logit_blocks(given)]
        return float(torch.cat(found).mean())

    def logits(self, given: Tensor, samples: Samples) -> Tensor:
        """[n, 1 + the largest block]: the match, then the others, -inf where there are none."""
        groups, parts = captions(samples), logit_blocks(given)
        result = given.new_full((len(given), 1 + max(len(part) for part in parts)), -torch.inf)
        start = 0
        for block in parts:
            rows = slice(start, start + len(block))
            match = groups[rows].unsqueeze(1) == groups[rows]
            ways = torch.stack([torch.log_softmax(block, 1), torch.log_softmax(block.T, 1)])
            result[rows, 0] = ways.masked_fill(~match, -torch.inf).logsumexp(2).mean(0)
            result[rows, 1 : 1 + len(block)] = ways.mean(0).masked_fill(match, -torch.inf)
            start += len(block)
        return result


class ImagesOfPairs(Samples):
    """The images of pairs, without their texts and of one class; for what looks at images only.

    Args:
        pairs: whose batches are (images, tokens).
    """

    def __init__(self, pairs: Samples):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def labels(self) -> Tensor:
        """One class for all."""
        return torch.zeros(len(self), dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the pairs."""
        return self.pairs.nbytes

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Images [B, C, H, W], and no labels."""
        return self.pairs.batch(indices, generator)[0][0], None

    def subset(self, indices: Any) -> ImagesOfPairs:
        """The images at these positions."""
        return ImagesOfPairs(self.pairs.subset(indices))

    def unlabelled(self) -> ImagesOfPairs:
        """Themselves."""
        return self

    def content_hash(self) -> str:
        """Of the pairs, marked as images alone."""
        return f"images/{self.pairs.content_hash()}"
