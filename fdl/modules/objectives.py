"""What a fit minimises, and what two of them have in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from fdl.modules.foreign import losses_of

if TYPE_CHECKING:
    from fdl.modules.types import Batch

Objective = Callable[[nn.Module, "Batch"], Mapping[str, Tensor]]
"""What a fit minimises: (module, batch) to named losses, of which ``"loss"`` is differentiated."""


class PenalizedObjective(ABC):
    """A module's own loss plus a penalty on its weights alone, as a dataclass whose fields are tensors and numbers.

    Written so, the penalty can be taken of parts of the weights, where no process has all of them, and clients can
    train in one pass, each with its own tensors. An objective of any other form is a plain function, or a dataclass
    with `__call__`.

    Attributes:
        anchor: one tensor for each of the module's parameters, in order, e.g. the weights that it is held near.
        ignores_padding: whether the module's own loss does (`ignores_padding` below); a penalty looks at no sample.
    """

    anchor: list[Tensor]
    ignores_padding: bool = False

    def __call__(self, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Return the named losses of one batch."""
        return self.add_penalty(training_step(module, batch), self.penalty(list(module.parameters()), self.anchor))

    @abstractmethod
    def penalty(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        """Return the penalty, a sum over weights.

        Args:
            parameters: the module's parameters, or parts of them.
            anchor: the anchor's tensors, or the same parts.
        """

    def add_penalty(self, losses: Mapping[str, Tensor], penalty: Tensor) -> dict[str, Tensor]:
        """Return the module's own losses with the penalty added to ``"loss"`` and named ``"penalty"``.

        Args:
            losses: the module's own, with ``"loss"``.
            penalty: the penalty over all weights.
        """
        return {**losses, "loss": losses["loss"] + penalty, "penalty": penalty}


def training_step(module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """The default objective: the module's own training step on a labelled batch."""
    losses = module.training_step(batch)
    known = isinstance(losses, dict) and "loss" in losses
    return losses if known else losses_of(losses, f"{type(module).__qualname__}.training_step")


def kind_of(objective: Objective) -> Any:
    """What objectives that are evaluated in one pass have in common: all but the tensors they hold."""
    if not dataclasses.is_dataclass(objective):
        return objective
    tensors = tensor_fields(objective)
    names = (field.name for field in dataclasses.fields(objective))
    return type(objective), {name: getattr(objective, name) for name in names if name not in tensors}


def is_repeatable(objective: Objective) -> bool:
    """Whether an objective gives the same whenever it is given the same, as far as can be told.

    Those are the module's own step, and dataclasses of tensors, numbers and strings; what a function remembers, nobody
    can tell.
    """
    if objective is training_step:
        return True
    if not dataclasses.is_dataclass(objective):
        return False
    held, values = tensor_fields(objective), vars(objective)
    return all(name in held or isinstance(value, bool | int | float | str | None) for name, value in values.items())


def tensor_fields(objective: Any) -> dict[str, Any]:
    """A dataclass's fields that are tensors or lists of tensors."""
    values = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) or (isinstance(value, list) and value and isinstance(value[0], Tensor))
    }


def is_traceable(module: nn.Module, objective: Objective) -> bool:
    """Whether an objective is marked `traceable`; the mark of a class does not reach its subclasses."""
    if objective is training_step:
        return getattr(type(module).training_step, "traceable", False)
    return "traceable" in vars(type(objective))


IGNORED_LABEL = -100
"""Label of a row that counts for nothing: what torch's cross entropy ignores."""


_Step = TypeVar("_Step", bound=Callable)


def marked_step(module: nn.Module, objective: Objective) -> Any:
    """Return what carries the marks of a fit: the module's training step, or the objective in its place."""
    return module.training_step if objective is training_step else objective


def is_padding_safe(step: Any) -> bool:
    """Tell whether a training step or an objective is marked with `ignores_padding`, or has it as an attribute."""
    return bool(getattr(step, "ignores_padding", False))


def terms_of(step: Any) -> Terms | None:
    """Return what `mean_over` has noted at a training step or an objective; None where it is not marked."""
    return getattr(step, "terms", None)


def ignores_padding(step: _Step) -> _Step:
    """Mark a training step: samples with the label `IGNORED_LABEL` count for nothing in any loss that it returns."""
    step.ignores_padding = True
    return step


Terms = Callable[[tuple], int]
"""How many terms the loss of a batch is the mean of."""


def mean_over(terms: Terms) -> Callable[[_Step], _Step]:
    """Mark an objective or a training step: every loss it returns is a mean over so many terms of the batch alone.

    A loss that compares a batch's samples with each other must not be marked.
    """

    def mark(step: _Step) -> _Step:
        step.terms = terms
        return step

    return mark


def samples_of(batch: tuple) -> int:
    """How many samples a batch has."""
    inputs = batch[0]
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)


def next_tokens_of(batch: tuple) -> int:
    """How many tokens of a batch of texts follow another one."""
    return int((batch[0][:, 1:] >= 0).sum())
