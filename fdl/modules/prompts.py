"""Prompt learning: learned context vectors instead of words, for frozen text towers."""

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
"""Standard deviation of randomly initialised context vectors (CoOp)."""


class ContextVectors(nn.Module):
    """Context vectors shared by all classes.

    Args:
        start: initial values of the shared vectors, ``[m, D]``.
        personal: p, number of further vectors, stored under the separate name ``personal`` for methods that keep them
            at the site; they follow the shared ones and are initialised near 0.
    """

    def __init__(self, start: Tensor, personal: int = 0):
        super().__init__()
        self.shared = nn.Parameter(start.clone())
        self.personal = nn.Parameter(_SPREAD * torch.randn(personal, start.shape[1])) if personal else None

    def forward(self, classes: Tensor) -> Tensor:
        """Return the vectors ``[m + p, D]``.

        Args:
            classes: numbers of the classes, int64 ``[c]``; ignored.
        """
        return self.shared if self.personal is None else torch.cat([self.shared, self.personal])


class PromptedTowers(nn.Module):
    """Frozen dual encoder as a classifier, with learned context vectors before the class names.

    Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (CoOp, 2022).

    Args:
        towers: dual encoder whose weights are available at every site.
        sentences: tokens of each class: m + p times `placeholder`, then the name; int64 ``[C, T]``, padded with -1.
        placeholder: token id at the positions of the context vectors.
        prompt: module that maps class numbers to context vectors ``[m + p, D]``.
        groups: class numbers per group of classes encoded together: first the trained ones, then the others, if any.
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
        """Return the unit vectors ``[c, D]`` of the classes of a group.

        Args:
            group: number of the group.
        """
        classes = getattr(self, f"group{group}")
        with placeholders_replaced(self.towers.get_submodule(self.embedding), self.placeholder, self.prompt(classes)):
            return self.towers.encode_text(self.sentences[classes])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, C]`` and the images' unit vectors ``[B, D]``.

        In training mode the logits of untrained classes are masked, so that nothing is learned from their names.

        Args:
            images: float32 ``[B, channels, H, W]``.
        """
        vectors = self.towers.encode_image(images)
        scale = self.towers.logit_scale.exp().clamp_max(MAX_SCALE)
        logits = vectors.new_full((len(images), len(self.sentences)), _IMPOSSIBLE)
        for group in range(1 if self.training else self.groups):
            texts = self.text_vectors(group).to(vectors)
            logits = logits.index_copy(1, getattr(self, f"group{group}"), (scale * vectors @ texts.T).to(logits))
        return logits, vectors


_IMPOSSIBLE = -1e4
"""Logit of masked classes: its softmax is 0, and it is representable in half precision."""


@contextmanager
def placeholders_replaced(embedding: nn.Embedding, placeholder: int, vectors: Tensor) -> Iterator[None]:
    """Replace the embeddings of placeholder tokens by given vectors, in order, while the context is open.

    Args:
        embedding: token embedding.
        placeholder: token id that occurs m times in each row.
        vectors: ``[m, D]``, or ``[B, m, D]`` for different vectors per row.
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
    """Return the name of a dual encoder's token embedding.

    Args:
        towers: dual encoder.
        token: any token id, by which the layer is recognised in a forward pass.

    Raises:
        UserError: the model has no token embedding.
    """
    called: list[str] = []

    def spy(name: str) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            if (arguments[0] == token).any():
                called.append(name)

        return towers.get_submodule(name).register_forward_hook(note)

    handles = [spy(name) for name, module in towers.named_modules() if isinstance(module, nn.Embedding)]
    try:
        towers.encode_text(torch.tensor([[token]]))
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise UserError(f"{type(towers).__name__} has no embedding of tokens that prompts could go through")
    return called[0]


def unused_token_id(texts: Sequence[Sequence[int]], marks: Sequence[int]) -> int:
    """Return the smallest positive token id that occurs in no text and is no start or end token; 0 is for padding.

    Args:
        texts: token ids of each text.
        marks: ids of the start and end tokens.
    """
    used = {0, *marks, *(token for text in texts for token in text)}
    return next(token for token in range(len(used) + 1) if token not in used)


def with_placeholders(names: Sequence[Sequence[int]], placeholder: int, vectors: int) -> Tensor:
    """Return the names, each preceded by placeholders, int64 ``[C, T]``, padded with -1.

    Args:
        names: token ids of each class name.
        placeholder: token id at the positions of the context vectors.
        vectors: number of placeholders per name.
    """
    return pad_texts([[placeholder] * vectors + list(name) for name in names])


def initial_context(embedding: nn.Embedding, words: Sequence[int], length: int) -> Tensor:
    """Return initial context vectors ``[m, D]``: the embeddings of words, or random values near 0.

    Args:
        embedding: token embedding.
        words: token ids of the words; empty for random values.
        length: m, if there are no words.
    """
    if words:
        return embedding.weight[torch.tensor(list(words))].detach().float()
    return _SPREAD * torch.randn(length, embedding.weight.shape[1])
