"""Classification without training: class names, put into sentences, become the weights of a classifier."""

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

TEMPLATES: dict[str, tuple[str, ...]] = {
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
"""Sets of sentences by name; {} stands for the class."""


def templates_of(templates: str | Sequence[str]) -> tuple[str, ...]:
    """A set by its name among `TEMPLATES`, or sentences of one's own.

    Raises:
        UserError: there is no such set, or a sentence has no place for the class.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise UserError(f"templates: no set is called {templates!r}{suggest(templates, TEMPLATES)}")
        return TEMPLATES[templates]
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
    """Turn class names into weights: each sentence's unit vector, their mean, of length 1 again.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4.

    Args:
        module: a dual encoder, with `encode_text`.
        tokenizer: the one that the module was trained with.
        classes: C names.
        templates: a name among `TEMPLATES`, or sentences with {} for the class.

    Returns:
        float32 ``[C, D]`` on the module's device; products with an image's unit vector are its cosines.
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
                tokens = padded([tokenizer.encode(sentence.replace("{}", name)) for sentence in sentences])
                vectors = F.normalize(module.encode_text(tokens.to(device)).float(), dim=1)
                rows.append(F.normalize(vectors.mean(0), dim=0))
    finally:
        module.train(training)
    return torch.stack(rows)


def zero_shot_question(classifier: Tensor) -> Callable[[nn.Module, Tensor | tuple[Tensor, Tensor]], Tensor]:
    """What to ask a dual encoder with `Participant.predict`, so that it answers with a classifier's logits [B, C].

    Args:
        classifier: ``[C, D]``, as from `zero_shot_classifier`.

    Returns:
        A function of module and inputs, which are images, or pairs of which the images are looked at.
    """

    def question(module: nn.Module, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        images = inputs if isinstance(inputs, Tensor) else inputs[0]
        vectors = module.encode_image(images).float()
        return module.logit_scale.exp() * vectors @ classifier.to(vectors).T

    return question


def padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """Token lists as one tensor int64 [B, T], padded on the right with -1; at least one column."""
    longest = max([1, *(len(text) for text in texts)])
    return torch.tensor([[*text, *[-1] * (longest - len(text))] for text in texts])
