"""Networks of open_clip: created by name or from a configuration, and filled from a file."""

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
# last projections of transformers, of CLIP's ResNets, of timm's towers, and of both kinds of text tower
_HEADS = ("visual.proj", "visual.attnpool.c_proj", "visual.head", "text_projection", "text.text_projection")


def create_named(model: str, pretrained: str | None) -> nn.Module:
    """Create a model by its name, with pretrained or random weights.

    Args:
        model: open_clip's name of the model.
        pretrained: tag of its weights; None for random ones.

    Raises:
        UserError: the tag is unknown, or its weights cannot be downloaded.
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
            "on a machine with a network and give its path as checkpoint, instead of pretrained"
        ) from error
    return network


def create_from_config(
    config: dict, input_shape: tuple[int, int, int], vocabulary: int, context: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Create open_clip's CLIP with random weights from a configuration.

    Args:
        config: ``{embed_dim, vision_cfg, text_cfg, quick_gelu}``; missing keys are derived from the data.
        input_shape: (C, H, W) of one image.
        vocabulary: number of token ids, including the start and end tokens.
        context: maximum number of tokens per text, including the start and end tokens.

    Returns:
        The network, and its complete configuration in the format of open_clip's files.

    Raises:
        UserError: a key is unknown, or sizes do not match each other.
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
    """Load a local file into a network; position embeddings are resampled if the file has a different number of them.

    Args:
        network: destination, changed in place; names must match exactly.
        path: ``.safetensors``, or a file of torch, of which only tensors and plain containers are accepted. Prefixes
            of wrappers and nested containers are handled by `read_weights`.
        label: name of the network in error messages.

    Raises:
        UserError: the file is missing, damaged, or belongs to another model.
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
    """Load a file whose prefixes or containers open_clip does not handle itself."""
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
    """List the names of the last projections of both towers.

    Args:
        network: network of open_clip.
    """
    known = {name for name, _ in network.named_parameters()} | {name for name, _ in network.named_modules()}
    return [name for name in _HEADS if name in known]


def lora_layers(network: nn.Module) -> list[str]:
    """List the linear layers that LoRA supports: not those of a ResNet's attention, which reads their weights only.

    Args:
        network: network of open_clip.
    """
    names = projection_names(network)
    return [name for name in linear_layers(network) if ".attnpool." not in f".{name}" and name not in names]


def preprocessing_of(network: nn.Module) -> dict[str, Any]:
    """Return the size, channels and normalisation of the images that a model expects.

    Args:
        network: network of open_clip.
    """
    settings = getattr(network.visual, "preprocess_cfg", None) or {}
    size = network.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    known = {"size": size, "mean": settings.get("mean"), "std": settings.get("std")}
    stem = next((m for m in network.visual.modules() if isinstance(m, nn.Conv2d)), None)
    return known | {"channels": 3 if stem is None else stem.in_channels}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress open_clip's warning about models without pretrained weights."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
