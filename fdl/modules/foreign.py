"""Adaptation of ordinary LightningModules to the interface that fdl's methods expect."""

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
    """Return a module with the interface that fdl's methods expect, wrapping the given one if necessary.

    Args:
        module: one of fdl's, or any that follows Lightning's contract: ``forward(x)`` returns logits, an `Output`, or
            an object or mapping with ``logits``; ``training_step(batch)`` or ``training_step(batch, batch_idx)``
            returns the loss, or a mapping with ``loss``.
        key: key of the module in the recipe, for messages.
        example: function that returns inputs of two samples, all zeros, from which lazy layers infer their sizes; None:
            not known.

    Returns:
        The module itself if it has the full interface; otherwise a `ForeignModule` around it.

    Raises:
        UserError: it has no forward or training step, uses manual optimisation, or fails on the example.
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
    output = None if example is None else _run_example(module, label, example())
    if lazy := next((name for name, parameter in module.named_parameters() if is_lazy(parameter)), None):
        raise UserError(f"{label}.forward does not use {lazy}, a lazy parameter, so its size cannot be told")
    takes = _takes_features(module)
    complete = output is None or (isinstance(output, Output) and output.embedding is not None)
    if takes and _required_arguments(module.training_step) == 1 and complete and isinstance(module, SupportsFederation):
        return module
    logits = None if output is None else _logits_of(output, label)
    adapted = ForeignModule(module, label, None if logits is None else logits.shape[-1])
    if adapted.embedding_dim is None and example is not None:
        adapted.embedding_dim = _run_example(adapted, label, example()).embedding.shape[-1]
    return adapted


class ForeignModule(FederatedModule):
    """Adapter from an ordinary LightningModule to the interface of fdl's own modules.

    The optimisers that the module configures are for a plain Trainer; in a federation those of the recipe are used. Its
    log calls are dropped, because no Trainer is attached.

    Args:
        module: the user's module.
        label: name of the module in error messages.
        outputs: number of its logits, by which its last layer is found; None: not known.

    Attributes:
        head: dotted name, within the module, of the layer whose input is the embedding; None if none was found, in
            which case the logits are used as the embedding.
        frozen: names that the module itself declares as frozen, with this adapter's prefix.
        embedding_dim: width that the module itself declares; otherwise measured on the example.
        input_shape: shape that the module itself declares.
        positions: number of positions that the module itself declares.
    """

    def __init__(self, module: LightningModule, label: str, outputs: int | None):
        super().__init__()
        # Lightning warns at every call; training without a Trainer is intended here
        warnings.filterwarnings("ignore", message=r".*trying to `self\.log.*trainer. reference is not registered")
        self.module, self.label = module, label
        self.head = None if outputs is None else last_layer(module, outputs)
        self._takes_features = _takes_features(module)
        # a module that does not inherit from FederatedModule may still declare some of its attributes
        self.frozen = frozenset(f"module.{name}" for name in getattr(module, "frozen", ()))
        for name in ("embedding_dim", "input_shape", "positions"):
            setattr(self, name, getattr(module, name, None))
        self._arguments = _required_arguments(module.training_step)

    @property
    def backbone(self) -> nn.Module:
        """The user's module, in which names of features are looked up."""
        return self.module

    def forward(self, x: Any, features: Sequence[str] = ()) -> Output:
        """Compute logits, embedding and requested activations of a batch.

        Args:
            x: inputs, in the format of the data.
            features: submodules of the module, by dotted name or glob, whose activations are returned.

        Raises:
            UserError: the module's output has no logits, or a name in `features` matches nothing.
        """
        if not features:
            return self._predict(x, {})
        if self._takes_features:
            return self._predict(x, None, features)
        with capture(self.module, features) as seen:
            output = self._predict(x, seen)
        return output

    def feature_network(self) -> nn.Module:
        """Return the network in which names of features are looked up: the module's own, or the module itself."""
        own = self.module.feature_network() if isinstance(self.module, SupportsFederation) else None
        return self.module if own is None else own

    def feature_head(self) -> str | None:
        """Return the name of the layer that computes logits, within the feature network."""
        return self.head if self.feature_network() is self.module else self.module.feature_head()

    @traceable
    def training_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss`` and all other numbers that the module's own step returns."""
        found = self.module.training_step(*(batch, batch_idx)[: self._arguments])
        return losses_of(found, f"{self.label}.training_step")

    def _predict(self, x: Any, seen: Mapping[str, Tensor] | None, features: Sequence[str] = ()) -> Output:
        """Predict a batch, with the activations in `seen`, or if that is None with those that the module returns."""
        named = {} if seen is not None else {"features": features}
        if self.head is None:
            output = self.module(x, **named)
            logits = _logits_of(output, self.label)
            return Output(logits, _embedding_of(output, logits), _features_of(output) if seen is None else seen)
        with capture_input(self.module.get_submodule(self.head)) as inputs:
            output = self.module(x, **named)
        logits = _logits_of(output, self.label)
        seen = _features_of(output) if seen is None else seen
        embedding = _embedding_of(output, inputs[-1] if inputs else logits)
        # the input of a convolutional head is averaged over positions
        return Output(logits, embedding.mean((2, 3)) if embedding.ndim == 4 else embedding, seen)


def losses_of(found: Any, label: str) -> dict[str, Tensor]:
    """Return the losses of a training step as a mapping.

    Args:
        found: result of the step: the loss, or a mapping with ``loss``, of whose other entries only floating-point
            scalars are kept.
        label: name of the step in error messages.

    Raises:
        UserError: the loss is missing, or is not a single number.
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
    """Return the output for an example in evaluation mode; this also initialises lazy layers."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module(example)
    except Exception as error:  # it is the user's code, which may raise anything
        shapes = " and ".join(str(list(x.shape)) for x in (example if isinstance(example, tuple) else (example,)))
        raise UserError(
            f"{label}.forward fails on inputs of shape {shapes}: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        module.train(training)


def _logits_of(output: Any, label: str) -> Tensor:
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{label}.forward returns {type(output).__name__}, expected logits, an Output, or something with logits"
        )
    return logits


def _features_of(output: Any) -> Mapping[str, Tensor]:
    return output.features if isinstance(output, Output) else {}


def _takes_features(module: LightningModule) -> bool:
    return "features" in inspect.signature(module.forward).parameters


def _embedding_of(output: Any, default: Tensor) -> Tensor:
    embedding = output.embedding if isinstance(output, Output) else None
    return default if embedding is None else embedding


def _required_arguments(step: Any) -> int:
    """Return the number of required arguments of a training step: 1 for batch, 2 for batch and batch_idx."""
    parameters = inspect.signature(step).parameters.values()
    fixed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(max(sum(p.default is p.empty for p in fixed), 1), 2)
