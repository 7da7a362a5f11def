"""The networks of open_clip: by name, of given sizes, or filled from a file."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fdl.errors import UserError
from fdl.modules.checkpoints import one_line, read_weights
from fdl.modules.clip_tokenizer import model_config
from fdl.modules.state_names import describe_mismatch
from fdl.modules.tuning import linear_layers
from fdl.utils.suggest import suggest

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_FAULTS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, SafetensorError)
# Last projections: of transformers, of CLIP's ResNets, of timm's towers, and of either kind of text tower.
_HEADS = ("visual.proj", "visual.attnpool.c_proj", "visual.head", "text_projection", "text.text_projection")


def create_named(model: str, pretrained: str | None) -> nn.Module:
    """Build a model by its name, with the weights of a tag or with new ones.

    Args:
        model: open_clip's name.
        pretrained: tag of its weights; None for new ones.

    Raises:
        UserError: there are no such weights, or they cannot be had.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is not None and pretrained not in tags:
        raise UserError(f"open_clip has no weights {pretrained!r} for {model}{suggest(pretrained, tags)}")
    published = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
    quick = bool(published.get("quick_gelu")) or bool(model_config(model).get("quick_gelu"))
    try:
        with _quiet():
            network = open_clip.create_model(model, pretrained, force_quick_gelu=quick)
    except (RuntimeError, OSError) as error:
        if pretrained is None:
            raise UserError(f"open_clip cannot build {model}: {error}") from error
        place = published.get("hf_hub") or published.get("url")
        raise UserError(
            f"the weights {pretrained} of {model} could not be had from {place} ({_first_line(error)}); fetch the file "
            "on a machine with a network and give its path as checkpoint, in the place of pretrained"
        ) from error
    return network


def create_from_config(
    config: dict, input_shape: tuple[int, int, int], vocabulary: int, context: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build open_clip's CLIP of given sizes.

    Args:
        config: ``{embed_dim, vision_cfg, text_cfg, quick_gelu}``; what it leaves out follows the data.
        input_shape: (C, H, W) of one image.
        vocabulary: number of token ids.
        context: tokens of a text, with the marks of start and end.

    Returns:
        The network, and its configuration as open_clip's own files have it.

    Raises:
        UserError: a key is unknown, or sizes do not fit together.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    for key in config:
        if key not in known:
            raise UserError(f"config: unknown key {key!r}{suggest(key, known, few=0)}")
    height, width = input_shape[1:]
    image = {"image_size": height if height == width else (height, width)}
    text = {"vocab_size": vocabulary, "context_length": context}
    parts = {}
    for key, kind, filled in (("vision_cfg", CLIPVisionCfg, image), ("text_cfg", CLIPTextCfg, text)):
        given = config.get(key) or {}
        for name in given:
            if name not in kind.__dataclass_fields__:
                raise UserError(f"config.{key}: unknown key {name!r}{suggest(name, kind.__dataclass_fields__, few=0)}")
        parts[key] = filled | given
    if parts["text_cfg"]["vocab_size"] < vocabulary:
        raise UserError(f"config.text_cfg.vocab_size: at least {vocabulary} for this tokenizer and two marks")
    try:
        network = CLIP(config.get("embed_dim", 64), **parts, quick_gelu=bool(config.get("quick_gelu")))
    except (RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"config: open_clip cannot build such a model: {error}") from error
    channels = input_shape[0]
    if channels != 3 and isinstance(getattr(network.visual, "conv1", None), nn.Conv2d):
        stem = network.visual.conv1
        network.visual.conv1 = nn.Conv2d(
            channels, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=stem.bias is not None
        )
    return network, {"embed_dim": 64, **config, **parts}


def fill_from_file(network: nn.Module, path: str, label: str) -> None:
    """Fill a model from a local file; positions are resampled where the file has another number of them.

    Args:
        network: filled in place; every name has to fit.
        path: ``.safetensors``, or a file of torch, of which only tensors and plain containers are accepted; prefixes
            and containers as in `read_weights`.
        label: what to call the network in messages.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    from open_clip.factory import load_checkpoint

    if not Path(path).is_file():
        raise UserError(f"checkpoint: no such file: {path}")
    if Path(path).suffix not in _FILES:
        raise UserError(f"checkpoint: {path} must end in {', '.join(_FILES)}")
    try:
        load_checkpoint(network, str(path), strict=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint: {path} is damaged or holds objects other than tensors: {_first_line(error)}"
        ) from error
    except _FAULTS:
        _read_wrapped(network, path, label)


def _read_wrapped(network: nn.Module, path: str, label: str) -> None:
    """As `fill_from_file`, from a file whose names or containers open_clip does not know."""
    from open_clip.factory import load_checkpoint

    weights = read_weights(path, network.state_dict())
    with TemporaryDirectory() as folder:  # open_clip reads files only
        unwrapped = Path(folder) / "weights.safetensors"
        save_file({name: value.clone().contiguous() for name, value in weights.items()}, unwrapped)
        try:
            load_checkpoint(network, str(unwrapped), strict=True)
        except _FAULTS as error:
            wrong = describe_mismatch(weights, network.state_dict()) or one_line(error)
            raise UserError(f"checkpoint: {path} does not fit {label}: {wrong}") from error


def projection_names(network: nn.Module) -> list[str]:
    """Name the last projections of both towers."""
    known = {name for name, _ in network.named_parameters()} | {name for name, _ in network.named_modules()}
    return [name for name in _HEADS if name in known]


def lora_layers(network: nn.Module) -> list[str]:
    """Name the linear layers that LoRA can be added to: not a ResNet's attention, which only takes their weights."""
    names = projection_names(network)
    return [name for name in linear_layers(network) if ".attnpool." not in f".{name}" and name not in names]


def preprocessing_of(network: nn.Module) -> dict[str, Any]:
    """What images a model knows."""
    settings = getattr(network.visual, "preprocess_cfg", None) or {}
    size = network.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    known = {"size": size, "mean": settings.get("mean"), "std": settings.get("std")}
    stem = next((m for m in network.visual.modules() if isinstance(m, nn.Conv2d)), None)
    return known | {"channels": 3 if stem is None else stem.in_channels}


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip writes a warning for every model without weights."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
