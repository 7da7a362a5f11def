"""Training objectives, and the marks by which executors recognise what may be batched, split or replayed."""

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
"""Training objective: (module, batch) to named losses, of which ``"loss"`` is differentiated."""


class PenalizedObjective(ABC):
    """A module's own loss plus a penalty that depends on its weights only.

    Subclasses are dataclasses whose fields are tensors and numbers. In this form the penalty can be computed from
    shards of the weights if no process holds all of them, and clients can be trained in one vectorised pass, each with
    its own tensors. An objective of any other form is a plain function, or a dataclass with `__call__`.

    Attributes:
        anchor: one tensor per parameter of the module, in order, e.g. the weights that it is kept close to.
        ignores_padding: True if the module's own loss ignores padded samples (see the function `ignores_padding`); the
            penalty does not depend on samples.
    """

    anchor: list[Tensor]
    ignores_padding: bool = False

    def __call__(self, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Return the named losses of one batch.

        Args:
            module: model in training.
            batch: labelled batch.
        """
        return self.add_penalty(training_step(module, batch), self.penalty(list(module.parameters()), self.anchor))

    @abstractmethod
    def penalty(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        """Return the penalty, a sum over weights.

        Args:
            parameters: the module's parameters, or shards of them.
            anchor: the anchor's tensors, or the same shards of them.
        """

    def add_penalty(self, losses: Mapping[str, Tensor], penalty: Tensor) -> dict[str, Tensor]:
        """Return the module's own losses with the penalty added to ``"loss"`` and named ``"penalty"``.

        Args:
            losses: the module's own losses, with ``"loss"``.
            penalty: the penalty over all weights, a scalar.
        """
        return {**losses, "loss": losses["loss"] + penalty, "penalty": penalty}


def training_step(module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Return the losses of the module's own training step: the default objective.

    Args:
        module: model in training.
        batch: labelled batch.
    """
    losses = module.training_step(batch)
    known = isinstance(losses, dict) and "loss" in losses
    return losses if known else losses_of(losses, f"{type(module).__qualname__}.training_step")


def kind_of(objective: Objective) -> Any:
    """Return a key that is equal for objectives that can be evaluated in one vectorised pass.

    It covers everything except the tensors of an objective.

    Args:
        objective: training objective of one client.
    """
    if not dataclasses.is_dataclass(objective):
        return objective
    tensors = tensor_fields(objective)
    names = (field.name for field in dataclasses.fields(objective))
    return type(objective), {name: getattr(objective, name) for name in names if name not in tensors}


def is_repeatable(objective: Objective) -> bool:
    """Return True if an objective is known to be a pure function of its fields and arguments.

    That holds for the module's own step, and for dataclasses of tensors, numbers and strings; the state of an arbitrary
    function cannot be inspected.

    Args:
        objective: training objective.
    """
    if objective is training_step:
        return True
    if not dataclasses.is_dataclass(objective):
        return False
    tensors, values = tensor_fields(objective), vars(objective)
    return all(name in tensors or isinstance(value, bool | int | float | str | None) for name, value in values.items())


def tensor_fields(objective: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are tensors or lists of tensors, by name.

    Args:
        objective: a dataclass instance.
    """
    values = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) or (isinstance(value, list) and value and isinstance(value[0], Tensor))
    }


def is_traceable(module: nn.Module, objective: Objective) -> bool:
    """Return True if an objective is marked `traceable`; subclasses do not inherit the mark of a class.

    Args:
        module: model whose training step is the default objective.
        objective: training objective.
    """
    if objective is training_step:
        return getattr(type(module).training_step, "traceable", False)
    return "traceable" in vars(type(objective))


IGNORED_LABEL = -100
"""Label of a padded row: the label that torch's cross entropy ignores."""


_Step = TypeVar("_Step", bound=Callable)


def marked_step(module: nn.Module, objective: Objective) -> Any:
    """Return the callable that carries the marks of a fit.

    Args:
        module: model whose training step is the default objective.
        objective: training objective.

    Returns:
        The module's training step for the default objective, otherwise the objective itself.
    """
    return module.training_step if objective is training_step else objective


def is_padding_safe(step: Any) -> bool:
    """Return True if a training step or an objective has the mark or the attribute `ignores_padding`.

    Args:
        step: training step or objective.
    """
    return bool(getattr(step, "ignores_padding", False))


def terms_of(step: Any) -> Terms | None:
    """Return the function that `mean_over` attached to a training step or an objective; None if it is not marked.

    Args:
        step: training step or objective.
    """
    return getattr(step, "terms", None)


def ignores_padding(step: _Step) -> _Step:
    """Mark a training step: none of its losses depends on samples with the label `IGNORED_LABEL`.

    Args:
        step: function; returned unchanged, with the attribute ``ignores_padding``.
    """
    step.ignores_padding = True
    return step


Terms = Callable[[tuple], int]
"""Function from a batch to the number of terms over which its loss is a mean."""


def mean_over(terms: Terms) -> Callable[[_Step], _Step]:
    """Mark an objective or a training step: every loss is a mean over ``terms(batch)`` independent terms.

    Its batches may then be split across ranks. A loss that compares the samples of a batch with each other must not be
    marked.

    Args:
        terms: function from a batch to the number of terms.
    """

    def mark(step: _Step) -> _Step:
        step.terms = terms
        return step

    return mark


def samples_of(batch: tuple) -> int:
    """Return the number of samples of a batch."""
    inputs = batch[0]
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)


def next_tokens_of(batch: tuple) -> int:
    """Return the number of tokens to predict in a batch of texts: all but the first of each text."""
    return int((batch[0][:, 1:] >= 0).sum())
