"""Private samples that can be read only by a training with noise.

Any other statistic computed from private data and uploaded (a temperature, a count, a mean) would carry no noise, and
the reported ε would be wrong. The guard is therefore not left to methods: under DP-SGD a client's samples are closed,
and open only while `fdl.privacy.dp_sgd` trains. Their number is public.
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
"""Modules that read samples on behalf of a caller; error messages name the caller instead."""


class PrivateDataGate:
    """Gate that permits reads of a client's private samples while it is open."""

    def __init__(self) -> None:
        self._depth = 0

    @property
    def is_open(self) -> bool:
        """True while reads are permitted."""
        return self._depth > 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Permit reads within this context."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


class GuardedSamples(Samples):
    """Samples behind a gate.

    Args:
        samples: the private samples.
        gate: the gate of their client.
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
        """Return inputs in the form in which they are copied to a device, while the gate is open."""
        return self._read().stored(indices)

    def normalised(self, x: Inputs) -> Inputs:
        """Convert stored inputs to those of `batch`."""
        return self._read().normalised(x)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather one batch, while the gate is open."""
        return self._read().batch(indices, generator)

    def subset(self, indices: Any) -> GuardedSamples:
        """Select the samples at the given positions, behind the same gate."""
        return GuardedSamples(self._samples.subset(indices), self._gate)

    def wrapped(self, wrap: Callable[[Samples], Samples]) -> GuardedSamples:
        """Wrap the samples behind the gate, without reading them.

        Args:
            wrap: function from samples to samples, such as a wrapper that counts reads.
        """
        return GuardedSamples(wrap(self._samples), self._gate)

    def unlabelled(self) -> GuardedSamples:
        """Return the same inputs without labels, behind the same gate."""
        return GuardedSamples(self._samples.unlabelled(), self._gate)

    def content_hash(self) -> str:
        """Return the hash of the inputs, while the gate is open."""
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
    """Test for guarded samples, also inside wrappers such as `fdl.knowledge.distillation.targets.SoftLabelled`."""
    while samples is not None:
        if isinstance(samples, GuardedSamples):
            return True
        samples = getattr(samples, "samples", None)
    return False


def _reader() -> str:
    """Find the module on whose behalf `GuardedSamples._read` was called."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("fdl.") and not name.startswith(_CARRIERS):
            return name
        frame = frame.f_back
    return "something"
