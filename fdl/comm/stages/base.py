"""Base classes of codec stages: one compression step and its inverse."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from fdl.errors import RejectedMessageError
from fdl.state.float_formats import is_float_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

#: Arrays of this size or less are left as they are: a scale or a second format costs more than it saves.
HANDFUL = 8


class ArraySpec(NamedTuple):
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


class EncodedArray(NamedTuple):
    """An array after a stage.

    Attributes:
        variant: which of its layouts the stage chose, 1 … 255; sent as one byte.
        main: the array that stands for the original; a later stage may change it further.
        sides: what else the inverse needs, such as scales.
        extents: sizes that the layout depends on and that nobody knows before the data; sent with the variant.
        complete: whether `main` is the array itself where the stage mostly sends a difference, so that a later stage
            must not leave anything out of it. The receiver need not know.
    """

    variant: int
    main: np.ndarray
    sides: tuple[np.ndarray, ...] = ()
    extents: tuple[int, ...] = ()
    complete: bool = False


#: What a stage keeps of one array on one link: arrays, and numbers of 64 bits.
CodecState = Mapping[str, "np.ndarray | int"]


class CodecContext:
    """Context of a stage, besides the array that it encodes or decodes.

    A stage that remembers reads `kept`, what the last accepted message left, and writes `draft`, what this one will
    leave if it is accepted. Sender and receiver do so each at its own end, and they agree: what a receiver keeps
    depends on nothing but the messages that it accepted, and the sender decodes its own message to learn what it holds.

    Attributes:
        rng: source of rounding noise, None where the chain draws none.
        round: the current round.
        rows: integers [n] that name the rows of the message's arrays, such as proxy samples; None when they are
            numbered from 0.
        kept: of this stage and array, empty before the first message.
        draft: of this stage and array.
    """

    __slots__ = ("draft", "kept", "rng", "round", "rows")

    def __init__(
        self,
        rng: np.random.Generator | None = None,
        round: int = 0,
        rows: np.ndarray | None = None,
        kept: CodecState | None = None,
        draft: dict[str, np.ndarray | int] | None = None,
    ):
        self.rng, self.round, self.rows = rng, round, rows
        self.kept = {} if kept is None else kept
        self.draft = {} if draft is None else draft


class Stage(ABC):
    """One reversible step of a codec chain.

    A concrete stage has a literal short `name` and is an `ArrayStage` or an `EntropyStage`. It holds configuration
    only, so one object serves every client and both directions; what it remembers of them lies in a `CodecContext`.

    Attributes:
        name: short name, for recipes, messages and the signature; no two stages of one chain share it.
        phase: place in a chain. Phases rise from stage to stage and none occurs twice: 8 stages that choose (labels),
            10 that difference (delta, cache), 12 that drop values (top_k), 20 that narrow a format (float16, quantize),
            30 that shorten bytes without loss (deflate).
        encoder_only: names of constructor arguments that `encode` or `compress` alone uses, such as an effort; sites
            that differ in them read each other's bytes.
    """

    name: ClassVar[str]
    phase: ClassVar[int]
    encoder_only: ClassVar[tuple[str, ...]] = ()
    __signature__: ClassVar[inspect.Signature]
    _arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `inspect` show the constructor's arguments, which `__new__` would hide, and check `encoder_only`.

        Raises:
            TypeError: `encoder_only` names an argument that the constructor does not take.
        """
        super().__init_subclass__(**kwargs)
        own = [] if cls.__init__ is object.__init__ else list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(own)
        if unknown := set(cls.encoder_only) - set(cls.__signature__.parameters):
            raise TypeError(f"{cls.__name__}.encoder_only names {unknown.pop()!r}, which its constructor does not take")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the constructor's arguments, which are part of the signature."""
        stage = super().__new__(cls)
        stage._arguments = {}
        if cls.__init__ is not object.__init__:
            with suppress(TypeError):  # a copy gets its attributes later, and wrong arguments are __init__'s to reject
                bound = inspect.signature(cls.__init__).bind(stage, *args, **kwargs)
                bound.apply_defaults()
                stage._arguments = dict(list(bound.arguments.items())[1:])
        return stage

    @property
    def signature(self) -> str:
        """Settings that a decoder depends on; two chains with equal signatures read each other's bytes.

        By default the name and all constructor arguments but those in `encoder_only`, so that two sites whose settings
        differ reject each other's messages instead of misreading them.
        """
        told = [f"{name}={_shown(value)}" for name, value in self._arguments.items() if name not in self.encoder_only]
        return f"{self.name}({','.join(told)})" if told else self.name

    def __str__(self) -> str:
        return self.signature

    def follows(self, before: Sequence[Stage]) -> None:
        """Check that the stage makes sense after those that stand before it in a chain.

        Raises:
            UserError: it does not; the message says why.
        """


class ArrayStage(Stage):
    """A stage that turns one array into smaller arrays.

    `encode` gives an `EncodedArray`: a main array, which a later stage may code further; sides, which are what the
    inverse needs beside it, such as scales; and a variant, the layout that was chosen (a stage of one layout says 1).
    `layout` tells from the variant alone which dtypes and shapes these arrays have, before any of their bytes are read,
    so that a receiver takes no memory that a message does not account for. Where a size depends on the values, such as
    how many were kept, it goes into `extents`, and `layout` checks it.

    Attributes:
        extents: number of sizes that its layouts need and that only the data can tell.
        margin: bytes by which the result may be larger than the array; above 0 for a stage that makes an array easier
            to shorten for those behind it.
        remembers: whether it keeps something from message to message.
        omits: whether it leaves values out, which the receiver takes as zero.
    """

    phase = 20
    extents: ClassVar[int] = 0
    margin: ClassVar[int] = 0
    remembers: bool = False
    omits: ClassVar[bool] = False

    def touches(self, spec: ArraySpec) -> bool:
        """Tell whether an array is this stage's business: real numbers, no scalar, more than a handful."""
        return is_float_dtype(spec.dtype) and len(spec.shape) > 0 and spec.size > HANDFUL

    @abstractmethod
    def encode(self, array: np.ndarray, turn: CodecContext) -> EncodedArray | None:
        """Shorten one array that the stage touches; the input is not changed.

        Args:
            array: C-contiguous; its dtype is one of the wire's.
            turn: random numbers, the round, and what the stage remembers.

        Returns:
            None for an array that the stage would rather leave alone.
        """

    @abstractmethod
    def layout(self, spec: ArraySpec, variant: int, extents: tuple[int, ...] = ()) -> tuple[ArraySpec, ...]:
        """Return what `encode` makes of such an array: the main array first, then the sides.

        Raises:
            RefusedError: there is no such variant, or the extents make no sense.
        """

    @abstractmethod
    def decode(self, spec: ArraySpec, coded: EncodedArray, turn: CodecContext) -> np.ndarray:
        """Return a new array of the original dtype and shape.

        Args:
            spec: dtype and shape of the original.
            coded: what `encode` returned, as it arrived: `layout` has accepted it, so dtypes and shapes are right;
                values are unchecked, and the arrays may be read-only.
            turn: the round, and what the stage remembers.

        Raises:
            RefusedError: the values cannot come from `encode`.
        """

    def draws(self) -> bool:
        """Tell whether `encode` needs random numbers."""
        return False

    def unknown(self, variant: int) -> RejectedMessageError:
        """The refusal of a variant that this stage never writes."""
        return RejectedMessageError(f"{self.name} has no variant {variant}")


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


def _shown(value: Any) -> str:
    """Return an argument of a stage in the form used by its signature."""
    if isinstance(value, Stage):
        return value.signature
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number and float(f"{value:g}") == value else repr(value)
