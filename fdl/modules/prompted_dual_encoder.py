"""A CLIP-like model as an image classifier of which prompts alone are trained."""

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
    """A frozen dual encoder that compares images with learned vectors followed by classes' names.

    Trained by plain `fedavg` it is PromptFL (Guo et al., 2022): context vectors, a few kilobytes, are all that is sent.
    Class names can be given that nobody trains on; they are answered all the same, behind the same vectors.

    Args:
        classes: names of the classes, in the order of the labels.
        model: open_clip's name, e.g. ``ViT-B-16``; one that reads CLIP's tokens.
        pretrained: tag of open_clip's weights.
        checkpoint: local file of weights instead: for `model` as in `OpenClip`, for `encoder` its state, e.g. the
            ``best.safetensors`` of a run of fdl.
        encoder: ``{target, args}`` of another dual encoder, e.g. ``tiny_dual_encoder``, in the place of `model`.
        tokenizer: that `encoder` was trained with.
        context: likewise, most tokens of a text.
        words: whose vectors the context starts from, so that the first answers are those of a sentence that begins
            so; empty for vectors near 0.
        length: number of shared vectors, where there are no words.
        personal: number of further vectors called ``backbone.prompt.personal``, for `federated_prompts`.
        ending: what stands behind the class's name.
        new: names of those classes that are not trained on.
        adapt: bring images to what the model knows, as in `OpenClip`.
        num_classes: number of classes.
        input_shape: (C, H, W) of one image.
        normalization: mean and standard deviation of each channel that the data are normalised with, for `adapt`.
        optimizer: for a plain Trainer, as in `ImageClassifier`.
        scheduler: for a plain Trainer, as in `ImageClassifier`.

    Raises:
        UserError: there are no weights, they do not fit, or names and classes do not.
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
        """What gives the context vectors.

        Args:
            start: where the shared ones start, ``[m, D]``.
            personal: how many belong to the site.
            towers: the frozen model.
            names: tokens of the classes' names alone, ``[C, T]``.
        """
        return ContextVectors(start, personal)


def class_groups(classes: Sequence[str], new: Sequence[str], num_classes: int) -> list[list[int]]:
    """Positions of the classes that are trained, and then of the new ones, where there are any.

    Raises:
        UserError: names do not fit.
    """
    if len(classes) != num_classes or len(set(classes)) < num_classes:
        raise UserError(f"classes must name the data's {num_classes} classes, each once; got {len(classes)} names")
    for name in new:
        if name not in classes:
            raise UserError(f"new: {name!r} is none of the classes{suggest(name, classes)}")
    groups = [[i for i, name in enumerate(classes) if (name in new) == late] for late in (False, True)]
    if not groups[0]:
        raise UserError("new: there must be classes to train on, too")
    return groups if groups[1] else groups[:1]


def _encoder_from_checkpoint(
    encoder: dict, pretrained: str | None, path: str | None, data: dict[str, Any]
) -> DualEncoder:
    """A dual encoder that is no named one of open_clip, with the weights of a file."""
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
