"""Attacks on a client's own data: it then follows the protocol, whatever the method sends."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fdl.adversaries.answers import in_range
from fdl.adversaries.base import Adversary
from fdl.datamodules.samples import ImageSamples, Samples, as_indices
from fdl.errors import UserError
from fdl.modules.types import Batch
from fdl.participants import Client
from fdl.utils.arguments import at_least


class LabelFlip(Adversary):
    """Train with class C - 1 - y in the place of y, as do the samples held out to calibrate."""

    name = "label_flip"
    spaces = ("data",)
    tasks = ("classification",)

    def __init__(self) -> None:
        super().__init__("own")
        self._classes = 0

    def prepare(self, client: Client) -> None:
        """Learn how many classes there are."""
        self._classes = client.num_classes

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """The same inputs with the other labels."""
        return Relabelled(samples, self._classes - 1 - samples.labels)


class Backdoor(Adversary):
    """Teach a class to all images with a trigger, a white square in the lower right corner.

    Source: Gu, Dolan-Gavitt and Garg, "BadNets" (2017). How far it got is measured by the evaluator ``backdoor``.

    Args:
        target: the class that triggered images are to be taken for.
        fraction: of its own images that get the trigger and the target's label, in (0, 1].
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
        """Refuse data that are no images, and a class that there is not."""
        in_range("target", self.target, client.num_classes)
        check_images(client.train, self.size)

    def corrupt(self, samples: Samples, generator: torch.Generator) -> Samples:
        """Some of the images, at random, with trigger and target."""
        count = len(samples)
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.randperm(count, generator=generator)[: round(self.fraction * count)]] = True
        return Triggered(samples, chosen, self.target, self.size)


class Relabelled(Samples):
    """Samples with other labels.

    Args:
        samples: the inputs.
        labels: the classes to say they are of, int64 [n]; None hides them.
    """

    def __init__(self, samples: Samples, labels: Tensor | None):
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return self.samples.nbytes

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Inputs, and the labels that are claimed."""
        labels = None if self.labels is None else self.labels[indices]
        return self.samples.batch(indices, generator)[0], labels

    def subset(self, indices: Tensor) -> Relabelled:
        """The samples at these positions."""
        return Relabelled(self.samples.subset(indices), self.labels[as_indices(indices, len(self))])

    def unlabelled(self) -> Samples:
        """The inputs alone."""
        return self.samples.unlabelled()

    def content_hash(self) -> str:
        """Hash of the inputs."""
        return self.samples.content_hash()


class Triggered(Relabelled):
    """Images of which some have a white square in the lower right corner, and are said to be of the target class.

    Args:
        samples: the images.
        chosen: which of them, bool [n].
        target: their class.
        size: side of the square in pixels.
    """

    def __init__(self, samples: ImageSamples, chosen: Tensor, target: int, size: int):
        super().__init__(samples, torch.where(chosen, target, samples.labels))
        self.chosen, self.target, self.size = chosen, target, size

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Images, augmented and normalised, and the square over them, of what white becomes."""
        images, labels = super().batch(indices, generator)
        images, chosen = images.clone(), self.chosen[indices]
        white = self.samples.normalised(torch.ones(1, images.shape[1], 1, 1))
        square = images[..., -self.size :, -self.size :]
        square[chosen] = white.expand(int(chosen.sum()), -1, self.size, self.size)
        return images, labels

    def subset(self, indices: Tensor) -> Triggered:
        """The images at these positions."""
        rows = as_indices(indices, len(self))
        return Triggered(self.samples.subset(rows), self.chosen[rows], self.target, self.size)

    def unlabelled(self) -> Triggered:
        """The same images, squares and all, without labels."""
        hidden = Triggered.__new__(Triggered)
        hidden.__dict__.update(self.__dict__, labels=None)
        return hidden

    def content_hash(self) -> str:
        """blake2b of the images and of where the squares are."""
        digest = hashlib.blake2b(self.samples.content_hash().encode(), digest_size=16)
        digest.update(f"{self.size}".encode() + self.chosen.numpy().tobytes())
        return digest.hexdigest()


def check_images(samples: Samples, size: int) -> None:
    """Refuse what the trigger cannot be put on.

    Raises:
        UserError: no images, or images smaller than the square.
    """
    if not isinstance(samples, ImageSamples) or len(samples.input_shape) != 3:
        raise UserError("a trigger is put on images, and these data have none")
    if size > min(samples.input_shape[1:]):
        raise UserError(f"size: {size}, but images are {samples.input_shape[2]}×{samples.input_shape[1]}")
