"""Data poisoning: attacks on a client's own data; it then follows the protocol, whatever the method sends."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fdl.adversaries.answers import check_class
from fdl.adversaries.base import Adversary
from fdl.datamodules.samples import ImageSamples, Samples, as_indices
from fdl.errors import UserError
from fdl.modules.types import Batch
from fdl.participants import Client
from fdl.utils.arguments import at_least


class LabelFlip(Adversary):
    """Label flipping: class C - 1 - y instead of y, in training samples and calibration samples."""

    name = "label_flip"
    spaces = ("data",)
    tasks = ("classification",)

    def __init__(self) -> None:
        super().__init__("own")
        self._classes = 0

    def prepare(self, client: Client) -> None:
        """Store the number of classes of the client's data."""
        self._classes = client.num_classes

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """Return the same inputs with flipped labels."""
        return Relabelled(samples, self._classes - 1 - samples.labels)


class Backdoor(Adversary):
    """Backdoor: images with a trigger, a white square in the lower right corner, are labelled as one class.

    Source: Gu, Dolan-Gavitt and Garg, "BadNets" (2017). The evaluator ``backdoor`` measures its success.

    Args:
        target: the class that a model shall predict for triggered images.
        fraction: share of the client's images that get the trigger and the target's label, in (0, 1].
        size: side of the square in pixels.
    """

    name = "backdoor"
    spaces = ("data",)
    tasks = ("classification",)

    def __init__(self, target: int = 0, fraction: float = 0.5, size: int = 2):
        super().__init__("own")
        if not 0 < fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {fraction}")
        self.target, self.fraction, self.size = target, fraction, at_least("size", size, 1)

    def prepare(self, client: Client) -> None:
        """Reject data that are not images, and a target class that they do not have."""
        check_class("target", self.target, client.num_classes)
        check_images(client.train, self.size)

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """Return the samples with trigger and target label on a random part of the images."""
        count = len(samples)
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.randperm(count, generator=generator)[: round(self.fraction * count)]] = True
        return Triggered(samples, chosen, self.target, self.size)


class Relabelled(Samples):
    """Samples with replaced labels.

    Args:
        samples: the inputs.
        labels: the new labels, int64 [n]; None hides them.
    """

    def __init__(self, samples: Samples, labels: Tensor | None):
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def nbytes(self) -> int:
        """Size of the inputs in bytes."""
        return self.samples.nbytes

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return the inputs and the replaced labels at `indices`."""
        labels = None if self.labels is None else self.labels[indices]
        return self.samples.batch(indices, generator)[0], labels

    def subset(self, indices: Tensor) -> Relabelled:
        """Return the samples at these positions."""
        return Relabelled(self.samples.subset(indices), self.labels[as_indices(indices, len(self))])

    def unlabelled(self) -> Samples:
        """Return the inputs without labels."""
        return self.samples.unlabelled()

    def content_hash(self) -> str:
        """Return the hash of the inputs."""
        return self.samples.content_hash()


class Triggered(Relabelled):
    """Images of which some have a white square in the lower right corner and the label of the target class.

    Args:
        samples: the images.
        chosen: mask of the images with the trigger, bool [n].
        target: the label of the images with the trigger.
        size: side of the square in pixels.
    """

    def __init__(self, samples: ImageSamples, chosen: Tensor, target: int, size: int):
        super().__init__(samples, torch.where(chosen, target, samples.labels))
        self.chosen, self.target, self.size = chosen, target, size

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return images, augmented and normalised, with the square on top, in the normalised value of white."""
        images, labels = super().batch(indices, generator)
        images, chosen = images.clone(), self.chosen[indices]
        white = self.samples.normalised(torch.ones(1, images.shape[1], 1, 1))
        square = images[..., -self.size :, -self.size :]
        square[chosen] = white.expand(int(chosen.sum()), -1, self.size, self.size)
        return images, labels

    def subset(self, indices: Tensor) -> Triggered:
        """Return the images at these positions."""
        rows = as_indices(indices, len(self))
        return Triggered(self.samples.subset(rows), self.chosen[rows], self.target, self.size)

    def unlabelled(self) -> Triggered:
        """Return the same images, with their triggers, without labels."""
        hidden = Triggered.__new__(Triggered)
        hidden.__dict__.update(self.__dict__, labels=None)
        return hidden

    def content_hash(self) -> str:
        """Return the blake2b hash of the images and of the places of the triggers."""
        digest = hashlib.blake2b(self.samples.content_hash().encode(), digest_size=16)
        digest.update(f"{self.size}".encode() + self.chosen.numpy().tobytes())
        return digest.hexdigest()


def check_images(samples: Samples, size: int) -> None:
    """Check that the trigger fits the samples.

    Args:
        samples: the samples to change.
        size: side of the square in pixels.

    Raises:
        UserError: no images, or images smaller than the square.
    """
    if not isinstance(samples, ImageSamples) or len(samples.input_shape) != 3:
        raise UserError("a trigger is put on images, and these data have none")
    if size > min(samples.input_shape[1:]):
        raise UserError(f"size: {size}, but images are {samples.input_shape[2]}×{samples.input_shape[1]}")
