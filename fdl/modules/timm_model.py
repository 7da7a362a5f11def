"""Image classifiers of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import timm
from timm.models import PretrainedCfg
from torch import nn

from fdl.errors import UserError
from fdl.modules.checkpoints import one_line, read_arrays, read_weights
from fdl.modules.classifier import ImageClassifier
from fdl.modules.input_adapter import adapter_for
from fdl.modules.state_names import describe_mismatch
from fdl.utils.suggest import suggest


class Timm(ImageClassifier):
    """Image classifier of timm, by name.

    Args:
        model: timm's name, with or without a tag of pretrained weights (``"vit_tiny_patch16_224.augreg_in21k"``), or
            ``hf-hub:`` with a repository of the Hugging Face hub, or ``local-dir:`` with a folder of the same files.
        pretrained: download timm's weights, or take them from its cache or the folder. The classification layer is
            new if they have a different number of classes.
        checkpoint: local file of weights instead, ``.safetensors``, of torch, or ``.npz`` with torch's names or, for
            the transformers for which timm supports it, Google's names.
        kwargs: further arguments of ``timm.create_model``, e.g. ``{drop_path_rate: 0.1}``.
        adapt: conversion of the images before the network (see `adapter_for`); True: to the size, channels and
            normalisation that timm publishes with the weights. By default only if `pretrained` weights are for a
            different size than the data's and the model is built for a fixed size: its position embeddings then stay as
            they were trained. The image size of a local file is unknown, so its position embeddings are resized unless
            `adapt` is set.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image. The model is built for C input channels and, if its size is fixed at
            construction, for H × W pixels, or for the shape that `adapt` produces.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        common: ``tuning``, ``lora``, ``optimizer`` and ``scheduler`` of `ImageClassifier`.

    Raises:
        UserError: the model or its weights are unknown, the file does not match the model, or images are too small.
    """

    name = "timm"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        kwargs: dict | None = None,
        adapt: bool | dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        **common: Any,
    ):
        if pretrained and checkpoint is not None:
            raise UserError("give pretrained or checkpoint, not both")
        config, settings = _configuration(model), dict(kwargs or {})
        size = tuple(config.input_size[1:])
        other_size = pretrained and config.fixed_input_size and size != tuple(input_shape[1:])
        adapter = adapter_for(
            adapt, input_shape, normalization, _published(config), wanted=other_size and "img_size" not in settings
        )
        channels, *size = input_shape if adapter is None else adapter.output_shape
        settings = {"in_chans": channels, **settings}
        if config.fixed_input_size:
            settings.setdefault("img_size", tuple(size))
        if checkpoint is None:
            network = _create(model, pretrained=pretrained, num_classes=num_classes, **settings)
            fresh = num_classes != config.num_classes
        else:
            network, fresh = _from_file(model, checkpoint, num_classes, settings)
        super().__init__(
            backbone=network,
            num_classes=num_classes,
            input_shape=input_shape,
            head=_head(network),
            adapter=adapter,
            pretrained=pretrained or checkpoint is not None,
            fresh_head=fresh,
            **common,
        )


def _configuration(model: str) -> PretrainedCfg:
    """Return timm's configuration of a model and its weights.

    Raises:
        UserError: the model or the tag of its weights is unknown.
    """
    source, colon, place = model.partition(":")
    if colon:
        return _from_source(model, source, place)
    architecture = model.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {model!r}{suggest(architecture, timm.list_models(), few=0)}")
    if architecture != model and model not in (tagged := timm.list_models(f"{architecture}.*", pretrained=True)):
        raise UserError(f"timm has no weights {model!r}{suggest(model, tagged)}")
    return timm.get_pretrained_cfg(model) or PretrainedCfg()


def _from_source(model: str, source: str, place: str) -> PretrainedCfg:
    """Return the configuration stored next to the weights in a repository of the hub or a folder."""
    from timm.models import _hub  # its exported names differ between releases

    readers = {"hf-hub": "from_hf", "hf_hub": "from_hf", "local-dir": "from_path"}
    if source not in readers:
        raise UserError(f"timm knows no source {source!r} of models{suggest(source, ['hf-hub', 'local-dir'], few=0)}")
    try:
        config, architecture, _ = getattr(_hub, f"load_model_config_{readers[source]}")(place)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"timm cannot find {model}: {one_line(error)}") from error
    if not timm.is_model(architecture):
        raise UserError(f"{model}: timm has no model {architecture!r}{suggest(architecture, timm.list_models())}")
    # only the settings of images and classes are used here; timm itself reads the file again
    known = PretrainedCfg.__dataclass_fields__
    return PretrainedCfg(**{key: value for key, value in config.items() if key in known})


def _published(config: PretrainedCfg) -> dict[str, Any]:
    """Return the size, channels and normalisation that the weights expect."""
    return {
        "size": tuple(config.input_size[1:]),
        "channels": config.input_size[0],
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation if config.interpolation in ("bicubic", "bilinear") else None,
    }


def _create(model: str, **settings: Any) -> nn.Module:
    try:
        return timm.create_model(model, **settings)
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, OSError) as error:
        raise UserError(f"timm cannot build {model}: {one_line(error)}") from error


def _from_file(model: str, path: str, num_classes: int, settings: dict[str, Any]) -> tuple[nn.Module, bool]:
    """Create a model with the weights and the number of outputs of a file, then change the number of outputs.

    In this order timm requires all names to match. With a different number of outputs from the start it would drop the
    classification layer and this requirement, and silently load nothing from a file of another architecture.

    Returns:
        The network, and True if its classification layer is new.
    """
    # Google's names are paths
    if Path(path).suffix == ".npz" and any("/" in name for name in read_arrays(path)):
        return _from_google(model, path, num_classes, settings)
    blank = _create(model, num_classes=num_classes, **settings)
    weights = read_weights(path, blank.state_dict())
    layer = weights.get(f"{_head(blank)}.weight")
    outputs = 0 if layer is None else len(layer)
    overlay = {"state_dict": weights, "num_classes": outputs, "custom_load": False, "label_offset": 0}
    stem = blank.pretrained_cfg.get("first_conv")
    if isinstance(stem, str) and f"{stem}.weight" in weights and blank.pretrained_cfg.get("input_size"):
        # the file's number of channels, which timm adapts to the data's; a grouped stem would need more than this
        overlay["input_size"] = (weights[f"{stem}.weight"].shape[1], *blank.pretrained_cfg["input_size"][1:])
    try:
        network = _create(model, pretrained=True, num_classes=outputs, pretrained_cfg_overlay=overlay, **settings)
    except UserError as error:
        # timm renames weights of known origin; otherwise a summary of the names is clearer than torch's full list
        wrong = describe_mismatch(
            weights, (name for name in blank.state_dict() if outputs or not name.startswith(_head(blank)))
        )
        raise UserError(f"checkpoint: {path} does not fit timm's {model}: {wrong or error}") from error
    # the configuration would otherwise keep a second copy of all weights in memory
    network.pretrained_cfg.pop("state_dict", None)
    if outputs != num_classes:
        network.reset_classifier(num_classes)
    return network, outputs != num_classes


def _from_google(model: str, path: str, num_classes: int, settings: dict[str, Any]) -> tuple[nn.Module, bool]:
    """Create a vision transformer with weights in the format published by Google."""
    network = _create(model, num_classes=num_classes, **settings)
    if not hasattr(network, "load_pretrained"):
        raise UserError(f"checkpoint: timm reads no .npz with Google's names for {model}; give .safetensors or .pth")
    before = network.get_classifier().weight.detach().clone()
    try:
        network.load_pretrained(str(path))
    except (RuntimeError, ValueError, KeyError, AttributeError, OSError, BadZipFile) as error:
        raise UserError(f"checkpoint: {path} does not fit timm's {model}: {one_line(error)}") from error
    return network, bool((network.get_classifier().weight == before).all())


def _head(network: nn.Module) -> str:
    """Return the name of the classification layer; the first of several, as in distilled models."""
    layer = network.get_classifier()
    if isinstance(layer, tuple | list | nn.ModuleList):
        layer = layer[0]
    name = next((name for name, module in network.named_modules() if name and module is layer), None)
    if name is None or not any(True for _ in layer.parameters()):
        raise UserError(f"timm's {type(network).__name__} has no classification layer")
    return name
