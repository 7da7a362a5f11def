"""Learned context vectors in the place of words, for text towers that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.losses.contrastive import MAX_SCALE
from fdl.modules.dual_encoder import DualEncoder
from fdl.modules.zero_shot import pad_texts

_SPREAD = 0.02
"""Standard deviation of context vectors that start from no words (CoOp)."""


class ContextVectors(nn.Module):
    """The same vectors for all classes.

    Args:
        start: where the shared ones start, ``[m, D]``.
        personal: p, how many more there are under a name of their own, ``personal``, for methods that keep them at the
            site; they come behind the shared ones and start near 0.
    """

    def __init__(self, start: Tensor, personal: int = 0):
        super().__init__()
        self.shared = nn.Parameter(start.clone())
        self.personal = nn.Parameter(_SPREAD * torch.randn(personal, start.shape[1])) if personal else None

    def forward(self, classes: Tensor) -> Tensor:
        """Return ``[m + p, D]``, whichever the classes (int64 ``[c]``) are."""
        return self.shared if self.personal is None else torch.cat([self.shared, self.personal])


class PromptedTowers(nn.Module):
    """Compares images with class names that come after learned vectors; everything but these is frozen.

    Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (CoOp, 2022).

    Args:
        towers: a dual encoder whose weights are known at every site.
        sentences: tokens of each class: m + p times `placeholder`, then the name; int64 ``[C, T]``, padded with -1.
        placeholder: the id that stands where a vector goes.
        prompt: gives the vectors ``[m + p, D]`` for some classes.
        groups: classes that are asked about together: those that are trained, and then those that are not, if any.
    """

    def __init__(
        self,
        towers: DualEncoder,
        sentences: Tensor,
        placeholder: int,
        prompt: nn.Module,
        groups: Sequence[Sequence[int]],
    ):
        super().__init__()
        self.towers, self.prompt, self.placeholder = towers.requires_grad_(False), prompt, placeholder
        self.embedding = token_embedding_name(towers, placeholder)
        self.register_buffer("sentences", sentences, persistent=False)
        for i, group in enumerate(groups):
            self.register_buffer(f"group{i}", torch.tensor(group), persistent=False)
        self.groups = len(groups)

    def text_vectors(self, group: int) -> Tensor:
        """Unit vectors ``[c, D]`` of a group's classes."""
        classes = getattr(self, f"group{group}")
        with placeholders_replaced(self.towers.get_submodule(self.embedding), self.placeholder, self.prompt(classes)):
            return self.towers.encode_text(self.sentences[classes])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, C]`` and the images' unit vectors.

        While it trains, only the classes that are trained are possible: of others not even the names are learnt from.
        """
        vectors = self.towers.encode_image(images)
        scale = self.towers.logit_scale.exp().clamp_max(MAX_SCALE)
        logits = vectors.new_full((len(images), len(self.sentences)), _IMPOSSIBLE)
        for group in range(1 if self.training else self.groups):
            texts = self.text_vectors(group).to(vectors)
            logits = logits.index_copy(1, getattr(self, f"group{group}"), (scale * vectors @ texts.T).to(logits))
        return logits, vectors


_IMPOSSIBLE = -1e4
"""A logit that no softmax leaves anything of, and that half precision can hold."""


@contextmanager
def placeholders_replaced(embedding: nn.Embedding, placeholder: int, vectors: Tensor) -> Iterator[None]:
    """Within this context an embedding gives these vectors, in order, where it is asked for the placeholder.

    Args:
        embedding: of tokens.
        placeholder: an id that each row contains as often as there are vectors.
        vectors: ``[m, D]``, or ``[B, m, D]`` for different ones in each row.
    """

    def insert(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        rows = vectors.expand(len(output), *vectors.shape[-2:])
        where = (arguments[0] == placeholder).unsqueeze(-1)
        return output.masked_scatter(where, rows.to(output))

    handle = embedding.register_forward_hook(insert)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def token_embedding_name(towers: DualEncoder, token: int) -> str:
    """Name the layer that turns a dual encoder's tokens into vectors.

    Raises:
        UserError: there is none.
    """
    asked: list[str] = []

    def spy(name: str) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            if (arguments[0] == token).any():
                asked.append(name)

        return towers.get_submodule(name).register_forward_hook(note)

    handles = [spy(name) for name, module in towers.named_modules() if isinstance(module, nn.Embedding)]
    try:
        towers.encode_text(torch.tensor([[token]]))
    finally:
        for handle in handles:
            handle.remove()
    if not asked:
        raise UserError(f"{type(towers).__name__} has no embedding of tokens that prompts could go through")
    return asked[0]


def unused_token_id(texts: Sequence[Sequence[int]], marks: Sequence[int]) -> int:
    """The smallest id above 0, which pads, that neither occurs in a text nor marks its start or end."""
    taken = {0, *marks, *(token for text in texts for token in text)}
    return next(token for token in range(len(taken) + 1) if token not in taken)


def with_placeholders(names: Sequence[Sequence[int]], placeholder: int, vectors: int) -> Tensor:
    """Every name behind as many placeholders as there are vectors, int64 ``[C, T]``, padded with -1."""
    return pad_texts([[placeholder] * vectors + list(name) for name in names])


def initial_context(embedding: nn.Embedding, words: Sequence[int], length: int) -> Tensor:
    """Where context vectors start, ``[m, D]``: at words' own vectors, or, without words, near 0.

    Args:
        embedding: of tokens.
        words: token ids; empty for none.
        length: m, where there are no words.
    """
    if words:
        return embedding.weight[torch.tensor(list(words))].detach().float()
    return _SPREAD * torch.randn(length, embedding.weight.shape[1])
