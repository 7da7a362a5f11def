"""What a stage of a codec chain is: one step that makes a message smaller, and its inverse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from fdl.errors import RefusedError
from fdl.floats import is_float

#: Arrays of this size or less are left as they are: a scale or a second format costs more than it saves.
HANDFUL = 8


class Spec(NamedTuple):
    """Dtype and shape of an array, known before its bytes are."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements, as a Python integer that cannot overflow."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array when nothing shortens it."""
        return self.size * self.dtype.itemsize


class Coded(NamedTuple):
    """An array after a stage.

    Attributes:
        variant: which of its layouts the stage chose, 1 … 255; sent as one byte.
        main: the array that stands for the original; a later stage may change it further.
        sides: what else the inverse needs, such as scales.
    """

    variant: int
    main: np.ndarray
    sides: tuple[np.ndarray, ...] = ()


class Stage(ABC):
    """One reversible step of a codec chain.

    A concrete stage has a literal short `name` and is an `ArrayStage` or an `EntropyStage`. It holds configuration
    only, so one object serves every client and both directions.
    """

    name: ClassVar[str]
    #: Where in a chain it stands. Phases rise from stage to stage; the gaps leave room for stages that choose,
    #: difference or drop values before their format is narrowed.
    phase: ClassVar[int]

    @property
    def signature(self) -> str:
        """What a decoder must know of this stage; two chains with equal signatures read each other's bytes."""
        return self.name


class ArrayStage(Stage):
    """A stage that turns one array of real numbers into smaller arrays."""

    phase = 20

    def touches(self, spec: Spec) -> bool:
        """Tell whether an array is this stage's business: real numbers, no scalar, more than a handful."""
        return is_float(spec.dtype) and len(spec.shape) > 0 and spec.size > HANDFUL

    @abstractmethod
    def encode(self, array: np.ndarray, rng: np.random.Generator | None) -> Coded:
        """Shorten one array that the stage touches; the input is not changed.

        Args:
            array: C-contiguous; its dtype is one of the wire's floating types.
            rng: source of rounding noise, None for a chain that draws none.
        """

    @abstractmethod
    def layout(self, spec: Spec, variant: int) -> tuple[Spec, ...]:
        """Return what `encode` makes of such an array: the main array first, then the sides.

        Raises:
            RefusedError: there is no such variant.
        """

    @abstractmethod
    def decode(self, spec: Spec, variant: int, main: np.ndarray, sides: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return a new array of the original dtype and shape.

        Args:
            spec: dtype and shape of the original.
            variant: as the sender chose it; `layout` has accepted it.
            main: of the layout's dtype and shape, its values unchecked; like the sides it may be read-only.
            sides: likewise.

        Raises:
            RefusedError: the values cannot come from `encode`.
        """

    def draws(self) -> bool:
        """Tell whether `encode` needs random numbers."""
        return False

    def unknown(self, variant: int) -> RefusedError:
        """The refusal of a variant that this stage never writes."""
        return RefusedError(f"{self.name} has no variant {variant}")


class EntropyStage(Stage):
    """A stage that shortens a run of bytes without loss."""

    phase = 30

    @abstractmethod
    def compress(self, data: bytes | memoryview) -> bytes:
        """Return the bytes shortened; longer output is dropped by the codec, which then sends `data` as it is."""

    @abstractmethod
    def expand(self, data: memoryview, size: int) -> bytes:
        """Return exactly `size` bytes.

        Raises:
            RefusedError: the data is damaged or holds more or fewer bytes. Memory never grows much past `size`.
        """
