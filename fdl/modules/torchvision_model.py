"""Image classifiers of torchvision."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn

from fdl.errors import UserError
from fdl.modules.checkpoints import load_weights, one_line, read_weights, set_input_channels, set_num_outputs
from fdl.modules.classifier import ImageClassifier
from fdl.modules.features import last_layer
from fdl.modules.input_adapter import adapter_for
from fdl.utils.suggest import suggest


class Torchvision(ImageClassifier):
    """Image classifier of torchvision, by name.

    Args:
        model: torchvision's name, e.g. ``"resnet18"``.
        weights: name of torchvision's weights of the model (``"DEFAULT"``, ``"IMAGENET1K_V1"``), downloaded or from the
            cache. The classification layer is new if they have a different number of classes.
        checkpoint: local file of weights instead, ``.safetensors``, of torch, or ``.npz``.
        kwargs: further arguments of the model, e.g. ``{image_size: 32}`` for its vision transformers.
        adapt: conversion of the images before the network (see `adapter_for`); True: to the size, channels and
            normalisation that torchvision publishes with the weights (for a local file, with its default weights). By
            default only if `weights` are for a different size than the data's and the model accepts no other size.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image. If C is not 3, the first convolution is changed to C channels, and its
            weights are summed or repeated.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        common: ``tuning``, ``lora``, ``optimizer`` and ``scheduler`` of `ImageClassifier`.

    Raises:
        UserError: the model or its weights are unknown, the file does not match the model, or images are too small.
    """

    name = "torchvision"

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        checkpoint: str | None = None,
        kwargs: dict | None = None,
        adapt: bool | dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        **common: Any,
    ):
        known = torchvision.models.list_models(module=torchvision.models)
        if model not in known:
            raise UserError(f"torchvision has no image classifier {model!r}{suggest(model, known, few=0)}")
        if weights is not None and checkpoint is not None:
            raise UserError("give weights or checkpoint, not both")
        network = _create(model, weights, num_classes, kwargs or {})
        head = last_layer(network)
        fixed = getattr(network, "image_size", None)
        other_size = weights is not None and fixed is not None and tuple(input_shape[1:]) != (fixed, fixed)
        adapter = adapter_for(adapt, input_shape, normalization, _published(model, weights), wanted=other_size)
        if checkpoint is not None:
            load_weights(
                network, head, read_weights(checkpoint, network.state_dict()), checkpoint, f"torchvision's {model}"
            )
        set_input_channels(network, input_shape[0] if adapter is None else adapter.output_shape[0])
        fresh = set_num_outputs(network, head, num_classes)
        super().__init__(
            backbone=network,
            num_classes=num_classes,
            input_shape=input_shape,
            head=head,
            adapter=adapter,
            pretrained=weights is not None or checkpoint is not None,
            fresh_head=fresh,
            **common,
        )


def _published(model: str, weights: str | None) -> dict[str, Any]:
    """Return the size, channels and normalisation that the weights expect; nothing is downloaded."""
    known = torchvision.models.get_model_weights(model)
    if not len(known):
        return {}
    transform = (known.DEFAULT if weights in (None, "DEFAULT") else known[weights]).transforms()
    side = transform.crop_size[0]
    return {
        "size": (side, side),
        "channels": len(transform.mean),
        "mean": transform.mean,
        "std": transform.std,
        "interpolation": "bicubic" if transform.interpolation.value == "bicubic" else "bilinear",
    }


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
        raise UserError(f"torchvision cannot build {model}: {one_line(error)}") from error
