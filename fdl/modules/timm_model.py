"""Any image classifier of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import timm
from torch import nn

from fdl.catalog import suggest
from fdl.errors import UserError
from fdl.modules.checkpoints import read_weights
from fdl.modules.classifier import ImageClassifier


class Timm(ImageClassifier):
    """Any image classifier of timm, by its name there.

    Args:
        model: timm's name, with or without a tag of pretrained weights (``"vit_tiny_patch16_224.augreg_in21k"``).
        pretrained: download timm's weights, or take them from its cache. The classification layer is new where these
            know another number of classes.
        checkpoint: local file of weights instead, ``.safetensors``, of torch, or Google's ``.npz`` for the
            transformers that timm reads it for.
        kwargs: further arguments of ``timm.create_model``, e.g. ``{drop_path_rate: 0.1}``.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image. The model gets C input channels, and, where its size is fixed at
            construction, H × W pixels.
        optimizer: for a plain Trainer, as in `ImageClassifier`.
        scheduler: for a plain Trainer, as in `ImageClassifier`.

    Raises:
        UserError: timm has no such model or weights, the file does not fit it, or images are too small for it.
    """

    name = "timm"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        kwargs: dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        fixed_size = ":" not in model and _takes_fixed_size(model)  # a colon names a source other than timm's registry
        if pretrained and checkpoint is not None:
            raise UserError("give pretrained or checkpoint, not both")
        settings: dict[str, Any] = {"in_chans": input_shape[0], **(kwargs or {})}
        if fixed_size:
            settings.setdefault("img_size", tuple(input_shape[1:]))
        if checkpoint is None:
            network = _create(model, pretrained=pretrained, num_classes=num_classes, **settings)
        else:
            network = _from_file(model, checkpoint, num_classes, settings)
        super().__init__(
            network,
            num_classes=num_classes,
            input_shape=input_shape,
            head=_head(network),
            optimizer=optimizer,
            scheduler=scheduler,
        )


def _takes_fixed_size(model: str) -> bool:
    """Whether a model is built for one size of images.

    Raises:
        UserError: timm has no such model, or no such weights for it.
    """
    architecture = model.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {model!r}{suggest(architecture, timm.list_models(), few=0)}")
    if architecture != model and model not in (tagged := timm.list_models(f"{architecture}.*", pretrained=True)):
        raise UserError(f"timm has no weights {model!r}{suggest(model, tagged)}")
    config = timm.get_pretrained_cfg(model)
    return config is not None and config.fixed_input_size


def _create(model: str, **settings: Any) -> nn.Module:
    try:
        return timm.create_model(model, **settings)
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, OSError) as error:
        raise UserError(f"timm cannot build {model}: {error}") from error


def _from_file(model: str, path: str, num_classes: int, settings: dict[str, Any]) -> nn.Module:
    """Build a model from a file's weights with as many outputs as the file has, then change the outputs.

    In this order timm demands that every name fits. Asked for another number of outputs at once, it would drop the
    classification layer and with it that demand, and a file of another architecture would load nothing in silence.
    """
    if Path(path).suffix == ".npz":
        if not Path(path).is_file():
            raise UserError(f"checkpoint: no such file: {path}")
        network = _create(model, num_classes=num_classes, **settings)
        if not hasattr(network, "load_pretrained"):
            raise UserError(f"checkpoint: timm reads no .npz for {model}; give .safetensors or .pth")
        try:
            network.load_pretrained(str(path))
        except (RuntimeError, ValueError, KeyError, AttributeError, OSError, BadZipFile) as error:
            raise UserError(f"checkpoint: {path} does not fit timm's {model}: {error}") from error
        return network
    weights = read_weights(path)
    blank = _create(model, num_classes=num_classes, **settings)
    layer = weights.get(f"{_head(blank)}.weight")
    outputs = 0 if layer is None else len(layer)
    overlay = {"state_dict": weights, "num_classes": outputs, "custom_load": False, "label_offset": 0}
    stem = blank.pretrained_cfg.get("first_conv")
    if isinstance(stem, str) and f"{stem}.weight" in weights and blank.pretrained_cfg.get("input_size"):
        # The file's own channels, which timm adapts to ours; a grouped stem would need more than this.
        overlay["input_size"] = (weights[f"{stem}.weight"].shape[1], *blank.pretrained_cfg["input_size"][1:])
    try:
        network = _create(model, pretrained=True, num_classes=outputs, pretrained_cfg_overlay=overlay, **settings)
    except UserError as error:
        raise UserError(f"checkpoint: {path} does not fit: {error}") from error
    # The configuration would otherwise keep a second copy of all weights alive.
    network.pretrained_cfg.pop("state_dict", None)
    if outputs != num_classes:
        network.reset_classifier(num_classes)
    return network


def _head(network: nn.Module) -> str:
    """Name the classification layer; of several, as in distilled models, the first."""
    layer = network.get_classifier()
    if isinstance(layer, tuple | list | nn.ModuleList):
        layer = layer[0]
    name = next((name for name, module in network.named_modules() if name and module is layer), None)
    if name is None or not any(True for _ in layer.parameters()):
        raise UserError(f"timm's {type(network).__name__} has no classification layer")
    return name
