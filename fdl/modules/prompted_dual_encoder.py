"""Image classifier from a frozen CLIP-like model with learned prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.checkpoints import read_weights
from fdl.modules.classifier import ImageClassifier
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.dual_encoder import DualEncoder
from fdl.modules.open_clip_model import OpenClip
from fdl.modules.prompts import (
    ContextVectors,
    PromptedTowers,
    initial_context,
    token_embedding_name,
    unused_token_id,
    with_placeholders,
)
from fdl.modules.tokenizers import make_tokenizer
from fdl.modules.tuning import frozen_names
from fdl.registry.instantiate import instantiate
from fdl.state import checkpoint as checkpoints
from fdl.state.weights import load_into, module_state
from fdl.utils.suggest import suggest


class PromptedDualEncoder(ImageClassifier):
    """Frozen dual encoder that classifies images by learned context vectors followed by class names.

    Trained with plain `fedavg` it is PromptFL (Guo et al., 2022): only the context vectors, a few kilobytes, are sent.
    Classes listed in `new` are not trained, but are predicted with the same context vectors.

    Args:
        classes: names of the classes, in the order of the labels.
        model: open_clip's name, e.g. ``ViT-B-16``, of a model that uses CLIP's tokenizer.
        pretrained: tag of open_clip's weights.
        checkpoint: local file of weights instead: for `model` ``.safetensors`` or of torch, for `encoder` its state,
            e.g. the ``best.safetensors`` of a run of fdl.
        encoder: ``{target, args}`` of another dual encoder, e.g. ``tiny_dual_encoder``, instead of `model`.
        tokenizer: tokenizer with which `encoder` was trained.
        context: maximum number of tokens per text with which `encoder` was trained.
        words: words whose embeddings initialise the context, so that the initial predictions are those of prompts that
            begin with them; empty for random values near 0.
        length: number of shared vectors, if there are no words.
        personal: number of further vectors called ``backbone.prompt.personal``, for `federated_prompts`.
        ending: text after the class name.
        new: names of the classes that are not trained.
        adapt: convert images to the size, channels and normalisation that the model expects (see `adapter_for`).
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        optimizer: ``{target, args}`` for a plain Trainer; default Adam at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Raises:
        UserError: no weights are given, they do not match the model, or the names do not match the classes.
    """

    name = "prompted_dual_encoder"

    def __init__(
        self,
        classes: list[str],
        model: str | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        encoder: dict | None = None,
        tokenizer: str = "bytes",
        context: int = 64,
        words: str = "a photo of a",
        length: int = 16,
        personal: int = 0,
        ending: str = ".",
        new: list[str] | None = None,
        adapt: bool | dict | None = None,
        *,
        num_classes: int,
        input_shape: tuple[int, int, int],
        normalization: tuple[list[float], list[float]] | None = None,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        for key, value, least in (("length", length, 1), ("personal", personal, 0)):
            if value < least:
                raise UserError(f"{key} must be at least {least}, got {value}")
        groups = class_groups(classes, new or [], num_classes)
        if (model is None) == (encoder is None):
            raise UserError("give model, a name of open_clip, or encoder, another dual encoder: one of the two")
        if pretrained is None and checkpoint is None:
            raise UserError("prompts are for known weights, which are not sent: give pretrained or checkpoint")
        reader = ClipTokenizer(model) if model is not None else make_tokenizer(tokenizer)
        data = {"input_shape": tuple(input_shape), "tokenizer": reader, "normalization": normalization}
        if model is not None:
            towers = OpenClip(model, pretrained, checkpoint, tuning="frozen", adapt=adapt, context=75, **data)
        else:
            towers = _encoder_from_checkpoint(encoder, pretrained, checkpoint, {**data, "context": context})
        room = towers.context - (2 if isinstance(towers, OpenClip) else 0)
        first = reader.encode(f"{words} ") if words else []
        names = [reader.encode(f"{name}{ending}") for name in classes]
        vectors = (len(first) or length) + personal
        longest = max(map(len, names))
        if vectors + longest > room:
            raise UserError(f"{vectors} vectors and a name of {longest} tokens exceed the {room} that a text may have")
        marks = [mark for mark in (getattr(towers, "start", None), getattr(towers, "end", None)) if mark is not None]
        placeholder = unused_token_id(names, marks)
        start = initial_context(towers.get_submodule(token_embedding_name(towers, placeholder)), first, length)
        sentences = with_placeholders(names, placeholder, vectors)
        plain = with_placeholders(names, placeholder, 0)
        prompt = self.make_prompt(start, personal, towers, plain)
        super().__init__(
            backbone=PromptedTowers(towers, sentences, placeholder, prompt, groups),
            num_classes=num_classes,
            input_shape=input_shape,
            optimizer=optimizer,
            scheduler=scheduler,
        )
        self.frozen = frozenset(f"backbone.{name}" for name in frozen_names(self.backbone))

    def make_prompt(self, start: Tensor, personal: int, towers: DualEncoder, names: Tensor) -> nn.Module:
        """Return the module that provides the context vectors; subclasses may override it.

        Args:
            start: initial values of the shared vectors, ``[m, D]``.
            personal: number of vectors that stay at the site.
            towers: the frozen dual encoder.
            names: tokens of the class names alone, int64 ``[C, T]``.
        """
        return ContextVectors(start, personal)


def class_groups(classes: Sequence[str], new: Sequence[str], num_classes: int) -> list[list[int]]:
    """Return the numbers of the trained classes, followed by those of the new classes, if any.

    Args:
        classes: names of all classes, in the order of the labels.
        new: names of the classes that are not trained.
        num_classes: number of classes of the data.

    Raises:
        UserError: the names do not match the data's classes or each other.
    """
    if len(classes) != num_classes or len(set(classes)) < num_classes:
        raise UserError(f"classes must name the data's {num_classes} classes, each once; got {len(classes)} names")
    for name in new:
        if name not in classes:
            raise UserError(f"new: {name!r} is none of the classes{suggest(name, classes)}")
    groups = [[i for i, name in enumerate(classes) if (name in new) == untrained] for untrained in (False, True)]
    if not groups[0]:
        raise UserError("new: there must be classes to train on, too")
    return groups if groups[1] else groups[:1]


def _encoder_from_checkpoint(
    encoder: dict, pretrained: str | None, path: str | None, data: dict[str, Any]
) -> DualEncoder:
    """Create a dual encoder from its configuration, with the weights of a local file."""
    if pretrained is not None or path is None:
        raise UserError("encoder takes its weights from checkpoint, a local file")
    towers = instantiate(encoder, "module", "encoder", **data)
    if not isinstance(towers, DualEncoder):
        raise UserError(f"encoder: {encoder['target']} is no dual encoder")
    weights = read_weights(path, module_state(towers))
    if any(name.startswith("student/") for name in weights):
        weights = checkpoints.load_best(Path(path))["student"]
    try:
        load_into(towers, weights)
    except ValueError as error:
        raise UserError(f"checkpoint: {path} does not fit: {error}") from error
    return towers
