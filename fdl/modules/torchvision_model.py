"""Any image classifier of torchvision."""

from __future__ import annotations

from typing import Any

import torchvision
from timm.models import adapt_input_conv
from torch import nn

from fdl.catalog import suggest
from fdl.errors import UserError
from fdl.modules.checkpoints import read_weights
from fdl.modules.classifier import ImageClassifier
from fdl.modules.features import last_layer


class Torchvision(ImageClassifier):
    """Any image classifier of torchvision, by its name there.

    Args:
        model: torchvision's name, e.g. ``"resnet18"``.
        weights: name of torchvision's weights for it (``"DEFAULT"``, ``"IMAGENET1K_V1"``), downloaded or from its
            cache. The classification layer is new where these know another number of classes.
        checkpoint: local file of weights instead, ``.safetensors`` or of torch.
        kwargs: further arguments of the model, e.g. ``{image_size: 32}`` for its vision transformers.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image. Where C is not 3, the first convolution is changed to C channels, with
            its weights summed or repeated.
        optimizer: for a plain Trainer, as in `ImageClassifier`.
        scheduler: for a plain Trainer, as in `ImageClassifier`.

    Raises:
        UserError: torchvision has no such model or weights, the file does not fit it, or images are too small.
    """

    name = "torchvision"

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        checkpoint: str | None = None,
        kwargs: dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        known = torchvision.models.list_models(module=torchvision.models)
        if model not in known:
            raise UserError(f"torchvision has no image classifier {model!r}{suggest(model, known, few=0)}")
        if weights is not None and checkpoint is not None:
            raise UserError("give weights or checkpoint, not both")
        network = _create(model, weights, num_classes, kwargs or {})
        head = last_layer(network)
        if checkpoint is not None:
            _load(network, head, model, checkpoint)
        _set_inputs(network, input_shape[0])
        _set_outputs(network, head, num_classes)
        super().__init__(
            network,
            num_classes=num_classes,
            input_shape=input_shape,
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
        )


def _create(model: str, weights: str | None, num_classes: int, settings: dict[str, Any]) -> nn.Module:
    if weights is not None:
        known = [entry.name for entry in torchvision.models.get_model_weights(model)]
        if weights not in ("DEFAULT", *known):
            raise UserError(f"torchvision has no weights {weights!r} for {model}{suggest(weights, known)}")
    else:
        settings = {"num_classes": num_classes, **settings}
    try:
        return torchvision.models.get_model(model, weights=weights, **settings)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"torchvision cannot build {model}: {error}") from error


def _load(network: nn.Module, head: str, model: str, path: str) -> None:
    """Load a file, whatever its numbers of input channels and classes."""
    state = read_weights(path)
    layer, stem = state.get(f"{head}.weight"), state.get(f"{_stem(network)}.weight")
    if layer is None or stem is None:
        raise UserError(f"checkpoint: {path} does not fit torchvision's {model}: its first or last layer is missing")
    _set_inputs(network, stem.shape[1])
    _set_outputs(network, head, len(layer))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} does not fit torchvision's {model}: {error}") from error


def _stem(network: nn.Module) -> str:
    return next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def _set_inputs(network: nn.Module, channels: int) -> None:
    """Change the first convolution's input channels; one channel then counts as if it were given three times."""
    name = _stem(network)
    conv = network.get_submodule(name)
    if conv.in_channels == channels:
        return
    if conv.in_channels != 3:
        raise UserError(f"weights for {conv.in_channels} input channels cannot be used with {channels}")
    weight = adapt_input_conv(channels, conv.weight.detach())
    conv.weight, conv.in_channels = nn.Parameter(weight), channels


def _set_outputs(network: nn.Module, head: str, count: int) -> None:
    """Give the classification layer another number of outputs, with new weights."""
    layer = network.get_submodule(head)
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.in_features, count, bias=layer.bias is not None)
        same = layer.out_features == count
    else:
        fresh = nn.Conv2d(layer.in_channels, count, layer.kernel_size)
        same = layer.out_channels == count
    if not same:
        owner, _, name = head.rpartition(".")
        setattr(network.get_submodule(owner), name, fresh)
