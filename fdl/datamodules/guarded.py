"""Private samples that nobody reads but a training with noise.

Whatever else is made of private data and sent, a temperature, a count, a mean, would go out without noise, and the ε
that is reported would be wrong. So it is not left to methods to think of it: under DP-SGD a client's samples are
closed, and open only while `fdl.privacy.dp_sgd` trains. How many there are is public.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fdl.datamodules.samples import Samples
from fdl.errors import UserError
from fdl.modules.types import Batch, Inputs

_CARRIERS = (
    "fdl.privacy.",
    "fdl.participants",
    "fdl.datamodules.guarded",
    "fdl.encoders.",
    "fdl.engine.",
    "fdl.knowledge.transfer.extraction",
)
"""Modules that read samples for others: it is these others that a message should name."""


class PrivateDataGate:
    """Whether a client's private samples may be read just now."""

    def __init__(self) -> None:
        self._depth = 0

    @property
    def is_open(self) -> bool:
        """Whether they may."""
        return self._depth > 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within this context they may."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


class GuardedSamples(Samples):
    """Samples behind a gate.

    Args:
        samples: private ones.
        gate: its client's.
    """

    def __init__(self, samples: Samples, gate: PrivateDataGate):
        self._samples, self._gate = samples, gate

    def __len__(self) -> int:
        return len(self._samples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._read(), name)

    @property
    def labels(self) -> Tensor | None:
        """Classes, while the gate is open."""
        return self._read().labels

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, which is public."""
        return self._samples.input_shape

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs, which are public as their number is."""
        return self._samples.nbytes

    @property
    def width(self) -> int | None:
        """Number of tokens of a batch of texts, while the gate is open."""
        return self._read().width

    @property
    def lengths(self) -> Tensor | None:
        """Number of tokens of each text, while the gate is open."""
        return self._read().lengths

    def stored(self, indices: Tensor) -> Inputs:
        """Inputs as they travel to a device, while the gate is open."""
        return self._read().stored(indices)

    def normalised(self, x: Inputs) -> Inputs:
        """Stored inputs as those of `batch`."""
        return self._read().normalised(x)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather one batch, while the gate is open."""
        return self._read().batch(indices, generator)

    def subset(self, indices: Any) -> GuardedSamples:
        """The samples at these positions, behind the same gate."""
        return GuardedSamples(self._samples.subset(indices), self._gate)

    def wrapped(self, wrap: Callable[[Samples], Samples]) -> GuardedSamples:
        """Wrap the samples behind the gate, without reading them.

        Args:
            wrap: makes samples of samples, such as a wrapper that counts reads.
        """
        return GuardedSamples(wrap(self._samples), self._gate)

    def unlabelled(self) -> GuardedSamples:
        """The same inputs without labels, behind the same gate."""
        return GuardedSamples(self._samples.unlabelled(), self._gate)

    def content_hash(self) -> str:
        """Hash of the inputs, while the gate is open."""
        return self._read().content_hash()

    def _read(self) -> Samples:
        if not self._gate.is_open:
            raise UserError(
                f"privacy: {_reader()} reads private samples outside of a training with noise, and what it makes of "
                "them would not be private; switch it off (calibrated temperatures, confidences from held-out samples "
                "or from density, prototypes and the like), or leave privacy out"
            )
        return self._samples


def is_guarded(samples: Samples) -> bool:
    """Whether samples, or those within, as in `fdl.knowledge.distillation.targets.SoftLabelled`, are private."""
    while samples is not None:
        if isinstance(samples, GuardedSamples):
            return True
        samples = getattr(samples, "samples", None)
    return False


def _reader() -> str:
    """The module that wants to read, seen from `GuardedSamples._read`."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("fdl.") and not name.startswith(_CARRIERS):
            return name
        frame = frame.f_back
    return "something"
