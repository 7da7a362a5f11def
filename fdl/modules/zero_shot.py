"""Zero-shot classification: classifier weights computed from class names in prompt templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.state.shards import full_parameters
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.modules.tokenizers import Tokenizer

PROMPT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "photos": (
        "a photo of a {}.",
        "a blurry photo of a {}.",
        "a bright photo of a {}.",
        "a dark photo of a {}.",
        "a close view of a {}.",
        "a small {} seen from far away.",
        "a large {} that fills the picture.",
        "a cropped picture of a {}.",
        "a black and white picture of a {}.",
        "a drawing of a {}.",
        "a {} in front of a plain background.",
        "one of many pictures of a {}.",
    ),
    "drawings": ("a drawing of a {}.", "a sketch of a {}.", "an icon of a {}.", "a painting of a {}."),
    "digits": ("the digit {}", "a handwritten {}", "the number {}", "a picture of the digit {}"),
}
"""Prompt templates by name; {} stands for the class name."""


def templates_of(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return prompt templates, given by name or as sentences.

    Args:
        templates: a key of `PROMPT_TEMPLATES`, or sentences with {} for the class name.

    Raises:
        UserError: the name is unknown, or a sentence has no placeholder for the class name.
    """
    if isinstance(templates, str):
        if templates not in PROMPT_TEMPLATES:
            raise UserError(f"templates: no set is called {templates!r}{suggest(templates, PROMPT_TEMPLATES)}")
        return PROMPT_TEMPLATES[templates]
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"templates: {template!r} must contain {{}} once, where the class's name goes")
    if not templates:
        raise UserError("templates: there are none")
    return tuple(templates)


@torch.no_grad()
def zero_shot_classifier(
    module: LightningModule, tokenizer: Tokenizer, classes: Sequence[str], templates: str | Sequence[str] = "photo"
) -> Tensor:
    """Compute the weights of each class: the re-normalised mean of its prompts' unit vectors.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4.

    Args:
        module: dual encoder with a method `encode_text`.
        tokenizer: tokenizer with which the module was trained.
        classes: names of the C classes.
        templates: a key of `PROMPT_TEMPLATES`, or sentences with {} for the class name.

    Returns:
        float32 ``[C, D]`` on the module's device; products with an image's unit vector are its cosines.

    Raises:
        UserError: `classes` is empty, or the templates are not valid.
    """
    if not classes:
        raise UserError("zero-shot classification needs the names of the classes, and the data give none")
    sentences = templates_of(templates)
    device, training = next(module.parameters()).device, module.training
    module.eval()
    try:
        rows = []
        with full_parameters(module):
            for name in classes:
                tokens = pad_texts([tokenizer.encode(sentence.replace("{}", name)) for sentence in sentences])
                vectors = F.normalize(module.encode_text(tokens.to(device)).float(), dim=1)
                rows.append(F.normalize(vectors.mean(0), dim=0))
    finally:
        module.train(training)
    return torch.stack(rows)


def zero_shot_selector(classifier: Tensor) -> Callable[[nn.Module, Tensor | tuple[Tensor, Tensor]], Tensor]:
    """Return an output selector for `Participant.predict` that computes logits [B, C] with a zero-shot classifier.

    Args:
        classifier: float32 ``[C, D]``, as returned by `zero_shot_classifier`.

    Returns:
        A function of module and inputs, which are images, or pairs of which only the images are used.
    """

    def logits_of(module: nn.Module, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        images = inputs if isinstance(inputs, Tensor) else inputs[0]
        vectors = module.encode_image(images).float()
        return module.logit_scale.exp() * vectors @ classifier.to(vectors).T

    return logits_of


def pad_texts(texts: Sequence[Sequence[int]]) -> Tensor:
    """Return token lists as one tensor int64 [B, T], padded on the right with -1, with at least one column.

    Args:
        texts: token ids of each text.
    """
    longest = max([1, *(len(text) for text in texts)])
    return torch.tensor([[*text, *[-1] * (longest - len(text))] for text in texts])
