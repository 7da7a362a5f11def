"""Examples of text: token ids in memory, handed out as padded batches."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdl.datamodules.samples import COPY_BELOW, Samples, as_indices
from fdl.errors import UserError
from fdl.modules.types import Batch

TOKEN_PADDING = -1
"""Stands where a text has ended; no tokenizer has such an id."""

_CHUNK = 4096
"""Texts at a time where all of them are read one after another."""


class TextSamples(Samples):
    """Texts as token ids, one after another in one array; subsets share it, or copy their part where it is small.

    Args:
        tokens: the ids of all texts in order, int [sum of lengths].
        lengths: number of tokens of each text, int [n].
        labels: classes [n]; None where unlabelled.
        groups: natural client or domain of each text, [n]; None where there are none.
        width: batches are padded to so many tokens, which no text exceeds; None pads them to their longest text.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        labels: Tensor | None = None,
        groups: np.ndarray | None = None,
        width: int | None = None,
    ):
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.sum() != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for texts of {lengths.sum()} tokens together")
        if width is not None and len(lengths) and lengths.max() > width:
            raise ValueError(f"a text of {lengths.max()} tokens is wider than {width}")
        for name, column in (("labels", labels), ("groups", groups)):
            if column is not None and len(column) != len(lengths):
                raise ValueError(f"{len(lengths)} texts with {len(column)} {name}")
        self._tokens, self._lengths = tokens, lengths
        self._starts = np.cumsum(lengths) - lengths
        self.labels = None if labels is None else labels.to(torch.int64)
        self.groups, self.width = groups, width
        self._hash: str | None = None

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each text, int64 [n]: texts of like lengths make batches with little padding."""
        return torch.from_numpy(self._lengths)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(T,): the width, or the length of the longest text."""
        return (self._widest(self._lengths),)

    @property
    def nbytes(self) -> int:
        """Bytes of the token ids as they are stored."""
        return int(self._lengths.sum()) * self._tokens.itemsize

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather token ids, int64 [B, T], padded on the right with `TOKEN_PADDING`; texts are never augmented."""
        rows = indices.numpy()
        lengths = self._lengths[rows]
        columns = np.arange(self._widest(lengths))
        places = self._starts[rows, None] + columns
        if len(lengths) and lengths.min() < len(columns):
            within = columns < lengths[:, None]
            tokens = np.full(places.shape, TOKEN_PADDING, dtype=np.int64)
            tokens[within] = self._tokens[places[within]]
        else:
            tokens = self._tokens[places].astype(np.int64)
        return torch.from_numpy(tokens), None if self.labels is None else self.labels[indices]

    def tokens(self, index: int) -> np.ndarray:
        """The ids of one text, without padding."""
        start = self._starts[index]
        return self._tokens[start : start + self._lengths[index]]

    def subset(self, indices: Any) -> TextSamples:
        """The texts at these positions; small sets get their own copy of the tokens."""
        rows = as_indices(indices, len(self))
        labels = None if self.labels is None else self.labels[rows]
        rows = rows.numpy()
        changed = self._changed(
            _starts=self._starts[rows],
            _lengths=self._lengths[rows],
            labels=labels,
            groups=None if self.groups is None else self.groups[rows],
        )
        if changed.nbytes < COPY_BELOW:
            changed._tokens = changed._in_order()
            changed._starts = np.cumsum(changed._lengths) - changed._lengths
        return changed

    def unlabelled(self) -> TextSamples:
        """The same texts without labels and groups; the tokens are shared."""
        return self._changed(labels=None, groups=None)

    def truncated(self, width: int) -> TextSamples:
        """The same texts, each cut to at most `width` tokens."""
        return self._changed(_lengths=np.minimum(self._lengths, width))

    def packed(self, width: int, separator: int | None) -> TextSamples:
        """Join texts and cut the result into windows of equal width.

        Every text is followed by the separator. No window holds texts of two groups: the last window of each group
        may be shorter, and is padded in a batch. One token alone predicts nothing, so a window of one is left out:
        where there is a separator, that is never more than the last one of a group.

        Args:
            width: tokens of a window.
            separator: id of the token between texts; None for a tokenizer without one.

        Returns:
            Unlabelled samples of windows with the groups' names in order, each group's texts in their order here.
        """
        names, codes = np.empty(0), np.zeros(len(self), dtype=np.int64)
        if self.groups is not None:
            names, codes = np.unique(self.groups, return_inverse=True)
        order = np.argsort(codes, kind="stable")
        texts = self.subset(order)
        # all texts in one array, with room for a separator behind each
        lengths = texts._lengths + (separator is not None)
        tokens = np.full(int(lengths.sum()), separator or 0, dtype=self._tokens.dtype)
        tokens[_ranges(np.cumsum(lengths) - lengths, texts._lengths)] = texts._in_order()
        pieces, windows, owners = [tokens[:0]], [], []
        for group, size in enumerate(np.bincount(codes[order], weights=lengths).astype(np.int64)):
            piece, tokens = tokens[:size], tokens[size:]
            whole, rest = divmod(int(size), width)
            cuts = [width] * whole + [rest] * (rest > 1)
            pieces.append(piece[: sum(cuts)])
            windows += cuts
            owners += [group] * len(cuts)
        groups = None if self.groups is None else names[np.array(owners, dtype=np.int64)]
        return TextSamples(np.concatenate(pieces), np.array(windows, dtype=np.int64), groups=groups, width=width)

    def content_hash(self) -> str:
        """blake2b of the token ids and lengths, computed once."""
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(f"text {len(self)} {self.width}\n".encode())
            digest.update(np.ascontiguousarray(self._lengths))
            for start in range(0, len(self), _CHUNK):
                part = slice(start, start + _CHUNK)
                places = _ranges(self._starts[part], self._lengths[part])
                digest.update(self._tokens[places].astype(np.uint32))
            self._hash = digest.hexdigest()
        return self._hash

    def _widest(self, lengths: np.ndarray) -> int:
        return self.width or (int(lengths.max()) if len(lengths) else 0)

    def _in_order(self) -> np.ndarray:
        """The ids of these texts only, one after another."""
        return self._tokens[_ranges(self._starts, self._lengths)]

    def _changed(self, **changes: Any) -> TextSamples:
        result = copy.copy(self)
        result.__dict__.update(changes, _hash=None)
        return result


def encoded(
    tokenizer: Any, texts: Sequence[str], labels: Tensor | None = None, groups: np.ndarray | None = None
) -> TextSamples:
    """Tokenise texts as they are.

    Args:
        tokenizer: as `fdl.modules.tokenizers` makes it.
        texts: what to tokenise.
        labels: as in `TextSamples`.
        groups: as in `TextSamples`.
    """
    parts = [
        from_ids(tokenizer, token_ids(tokenizer, texts[start : start + _CHUNK]))
        for start in range(0, max(len(texts), 1), _CHUNK)  # lists of ids take many times the memory of an array
    ]
    tokens, lengths = ([getattr(part, name) for part in parts] for name in ("_tokens", "_lengths"))
    return TextSamples(np.concatenate(tokens), np.concatenate(lengths), labels, groups)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, all at once where the tokenizer can."""
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(text) for text in texts]


def from_ids(
    tokenizer: Any, ids: Sequence[Sequence[int]], labels: Tensor | None = None, groups: np.ndarray | None = None
) -> TextSamples:
    """Samples of token ids, stored in two bytes each where the vocabulary allows; arguments as in `encoded`."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens = np.fromiter(chain.from_iterable(ids), dtype=dtype)
    return TextSamples(tokens, [len(one) for one in ids], labels, groups)


def require_same_tokenizer(own: Any, public: Any, name: str) -> None:
    """Check that a proxy set's token ids mean the same as the private ones.

    Args:
        own: the data module with the private samples.
        public: the data module with the proxy set.
        name: what the private data module is called in messages.

    Raises:
        UserError: when the public data are no text or have another tokenizer.
    """
    tokenizer = getattr(public, "tokenizer", None)
    if tokenizer is None:
        raise UserError(f"proxy: {public.name} has no text, and {name} needs some")
    if tokenizer.fingerprint != own.tokenizer.fingerprint:
        raise UserError(f"proxy: {public.name} and {name} have different tokenizers; give both the same")


def token_limit(context: int, tokenizer: str) -> str:
    """A length in tokens, for messages, which say what tokens are where no tokenizer was chosen."""
    return f"{context} tokens" + (", which are bytes (set tokenizer for others)" if tokenizer == "bytes" else "")


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0] … starts[0]+lengths[0]-1, starts[1] …: positions of ragged rows in one array."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
