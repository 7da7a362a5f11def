"""LightningModules that were written without fdl in mind, as its methods ask models."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fdl.errors import UserError
from fdl.modules.base import FederatedModule, SupportsFederation
from fdl.modules.checkpoints import one_line
from fdl.modules.features import capture, capture_input, last_layer
from fdl.modules.output import Output
from fdl.modules.tracing import traceable


def as_federated_module(module: LightningModule, key: str, example: Callable[[], Any] | None) -> LightningModule:
    """Make sure that a model can be asked and trained in a federation.

    Args:
        module: fdl's own, or anybody's that keeps to Lightning's contract: ``forward(x)`` returns logits, an `Output`,
            or an object or mapping with ``logits``; ``training_step(batch)`` or ``training_step(batch, batch_idx)``
            returns the loss, or a mapping with ``loss``.
        key: where in the recipe it stands, for messages.
        example: gives inputs of two samples, all zeros, of which lazy layers learn their sizes; None: not known.

    Returns:
        The module itself where it takes what fdl's methods give and returns what they take; else a `ForeignModule`
        around it.

    Raises:
        UserError: it has no forward or training step, optimises by itself, or cannot answer the example.
    """
    kind = type(module)
    if kind.__module__.partition(".")[0] == "fdl":
        return module
    label = f"{key}: {kind.__module__}.{kind.__qualname__}"
    for name in ("forward", "training_step"):
        if getattr(kind, name) is getattr(LightningModule, name):
            raise UserError(f"{label} has no {name}; a model needs forward(x) and training_step(batch, batch_idx)")
    if not module.automatic_optimization:
        raise UserError(
            f"{label} sets automatic_optimization = False; fdl optimises as local_training and "
            "server_distil say, so its training_step must return the loss"
        )
    answer = None if example is None else _run_example(module, label, example())
    if lazy := next((name for name, parameter in module.named_parameters() if is_lazy(parameter)), None):
        raise UserError(f"{label}.forward does not use {lazy}, a lazy parameter, so its size cannot be told")
    takes = _takes_features(module)
    complete = answer is None or (isinstance(answer, Output) and answer.embedding is not None)
    if takes and _required_arguments(module.training_step) == 1 and complete and isinstance(module, SupportsFederation):
        return module
    logits = None if answer is None else _logits(answer, label)
    adapted = ForeignModule(module, label, None if logits is None else logits.shape[-1])
    if adapted.embedding_dim is None and example is not None:
        adapted.embedding_dim = _run_example(adapted, label, example()).embedding.shape[-1]
    return adapted


class ForeignModule(FederatedModule):
    """Asks a LightningModule as Lightning does, and answers as fdl's own modules do.

    The optimisers that the module configures are for a plain Trainer; in a federation the recipe's are used. What it
    logs is dropped, as there is no Trainer to log to.

    Args:
        module: the user's.
        label: what messages call it.
        outputs: number of its logits, by which its last layer is found; None: not known.

    Attributes:
        head: dotted name, within the module, of the layer whose input is the embedding; None where none was found, and
            logits stand for the embedding.
        frozen: what the module itself declares, as it is named here.
        embedding_dim: what the module itself declares; otherwise measured on the example.
        input_shape: what the module itself declares.
        positions: what the module itself declares.
    """

    def __init__(self, module: LightningModule, label: str, outputs: int | None):
        super().__init__()
        # Lightning says so for every call; there is no Trainer, and that is as it should be
        warnings.filterwarnings("ignore", message=r".*trying to `self\.log.*trainer. reference is not registered")
        self.module, self.label = module, label
        self.head = None if outputs is None else last_layer(module, outputs)
        self._takes_features = _takes_features(module)
        # a module that inherits from no class of ours may still declare some of it
        self.frozen = frozenset(f"module.{name}" for name in getattr(module, "frozen", ()))
        for name in ("embedding_dim", "input_shape", "positions"):
            setattr(self, name, getattr(module, name, None))
        self._arguments = _required_arguments(module.training_step)

    @property
    def backbone(self) -> nn.Module:
        """The user's module, whose parts features are named after."""
        return self.module

    def forward(self, x: Any, features: Sequence[str] = ()) -> Output:
        """Answer a batch.

        Args:
            x: inputs, as the data give them.
            features: parts of the module, by dotted name or glob, whose activations are wanted.

        Raises:
            UserError: what the module returns has no logits, or a name in `features` matches nothing.
        """
        if not features:
            return self._predict(x, {})
        if self._takes_features:
            return self._predict(x, None, features)
        with capture(self.module, features) as seen:
            output = self._predict(x, seen)
        return output

    def feature_network(self) -> nn.Module:
        """Return the network whose submodules features are named after: the module's own choice, or the module."""
        own = self.module.feature_network() if isinstance(self.module, SupportsFederation) else None
        return self.module if own is None else own

    def feature_head(self) -> str | None:
        """Return the name of the layer that makes logits, within the feature network."""
        return self.head if self.feature_network() is self.module else self.module.feature_head()

    @traceable
    def training_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss`` and what other numbers the module's own step returns."""
        found = self.module.training_step(*(batch, batch_idx)[: self._arguments])
        return losses_of(found, f"{self.label}.training_step")

    def _predict(self, x: Any, seen: Mapping[str, Tensor] | None, features: Sequence[str] = ()) -> Output:
        """Answer a batch, with the activations in `seen`, or where that is None with those that the module gives."""
        named = {} if seen is not None else {"features": features}
        if self.head is None:
            answer = self.module(x, **named)
            logits = _logits(answer, self.label)
            return Output(logits, _embedding(answer, logits), _features(answer) if seen is None else seen)
        with capture_input(self.module.get_submodule(self.head)) as inputs:
            answer = self.module(x, **named)
        logits = _logits(answer, self.label)
        seen = _features(answer) if seen is None else seen
        embedding = _embedding(answer, inputs[-1] if inputs else logits)
        # of a convolution over the whole image, the mean over positions
        return Output(logits, embedding.mean((2, 3)) if embedding.ndim == 4 else embedding, seen)


def losses_of(found: Any, label: str) -> dict[str, Tensor]:
    """Read what a training step returns.

    Args:
        found: the loss, or a mapping with ``loss``; of its other entries, numbers are kept.
        label: what messages call the step.

    Raises:
        UserError: there is no loss, or it is no single number.
    """
    losses = {"loss": found} if isinstance(found, Tensor) else found
    loss = losses.get("loss") if isinstance(losses, Mapping) else None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {list(loss.shape)} as its loss" if isinstance(loss, Tensor) else type(found).__name__
        raise UserError(f"{label} returns {got}, expected the loss, a tensor of one number, or a mapping with 'loss'")
    # predictions, counts and the like are for the module's own hooks
    numbers = {k: v for k, v in losses.items() if isinstance(v, Tensor) and v.ndim == 0 and v.is_floating_point()}
    return {**numbers, "loss": loss.reshape(())}


def _run_example(module: LightningModule, label: str, example: Any) -> Any:
    """The answer to an example in evaluation mode; lazy layers then have their sizes."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module(example)
    except Exception as error:  # it is the user's code: whatever it raises is told in one sentence
        shapes = " and ".join(str(list(x.shape)) for x in (example if isinstance(example, tuple) else (example,)))
        raise UserError(
            f"{label}.forward cannot answer inputs of shape {shapes}: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        module.train(training)


def _logits(answer: Any, label: str) -> Tensor:
    logits = answer
    if not isinstance(answer, Tensor):
        logits = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{label}.forward returns {type(answer).__name__}, expected logits, an Output, or something with logits"
        )
    return logits


def _features(answer: Any) -> Mapping[str, Tensor]:
    return answer.features if isinstance(answer, Output) else {}


def _takes_features(module: LightningModule) -> bool:
    return "features" in inspect.signature(module.forward).parameters


def _embedding(answer: Any, otherwise: Tensor) -> Tensor:
    embedding = answer.embedding if isinstance(answer, Output) else None
    return otherwise if embedding is None else embedding


def _required_arguments(step: Any) -> int:
    """How many of batch and batch_idx a training step must be given."""
    parameters = inspect.signature(step).parameters.values()
    fixed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(max(sum(p.default is p.empty for p in fixed), 1), 2)
