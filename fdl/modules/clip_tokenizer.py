"""CLIP's tokenizer; its vocabulary is part of open_clip, so nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fdl.errors import UserError
from fdl.utils.suggest import suggest

PREFIX = "open_clip:"
"""Prefix of the specification of an open_clip model's tokenizer."""

TOKENIZER_FILE = "open_clip_tokenizer.json"
"""Name of the file that `ClipTokenizer.save` writes."""


class ClipTokenizer:
    """Byte-pair encoding of OpenAI's CLIP, which most models of open_clip share.

    It has the interface of `fdl.modules.tokenizers.Tokenizer`. Texts are cleaned and lower-cased as in open_clip, and
    by default encoded without start and end tokens: a CLIP text tower adds them itself.

    Args:
        model: any open_clip model that uses this encoding.

    Raises:
        UserError: the model is unknown, or has a different tokenizer.
    """

    def __init__(self, model: str = "ViT-B-32"):
        from open_clip.tokenizer import SimpleTokenizer, default_bpe

        if not reads_clip_tokens(model):
            raise UserError(f"tokenizer: {model} does not read CLIP's byte-pair encoding, the only one supported here")
        self.model, self.label, self._tokenizer = model, f"{PREFIX}{model}", SimpleTokenizer()
        self.start, self.eos = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        self.vocab_size = self._tokenizer.vocab_size
        digest = hashlib.blake2b(Path(default_bpe()).read_bytes(), digest_size=16).hexdigest()
        self.fingerprint = f"clip-bpe/{digest}"

    def encode(self, text: str, special: bool = False, limit: int | None = None) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any text.
            special: add the start and end tokens.
            limit: maximum number of ids, including special ones; the end of the text is cut off.
        """
        ids = self._tokenizer.encode(text)
        if not special:
            return ids[:limit]
        room = None if limit is None else max(limit - 2, 0)
        return [self.start, *ids[:room], self.eos]

    def encode_batch(self, texts: Sequence[str], special: bool = False, limit: int | None = None) -> list[list[int]]:
        """Return the ids of several texts, see `encode`.

        Args:
            texts: texts to encode.
            special: add the start and end tokens.
            limit: maximum number of ids per text, including special ones.
        """
        return [self.encode(text, special, limit) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, in lower case and with single spaces, without start and end tokens.

        Args:
            ids: token ids.
        """
        return self._tokenizer.decode([i for i in map(int, ids) if i not in (self.start, self.eos)]).strip()

    @cached_property
    def pieces(self) -> list[bytes]:
        """Bytes of cleaned text of each id, with a space at the end of a word; empty for start and end tokens."""
        known, table = self._tokenizer.byte_decoder, self._tokenizer.decoder
        pieces = []
        for id in range(self.vocab_size):
            token = "" if id in (self.start, self.eos) else table[id]
            word = token.removesuffix("</w>")
            pieces.append(bytes(known[character] for character in word) + (b" " if word != token else b""))
        return pieces

    def token_bytes(self, ids: Iterable[int]) -> int:
        """Return the number of bytes of cleaned text that ids represent.

        Args:
            ids: token ids.
        """
        return sum(len(self.pieces[int(i)]) for i in ids)

    def matches(self, other: Any) -> bool:
        """Return True if ids mean the same in both: their fingerprints or the bytes of all ids are equal.

        Args:
            other: tokenizer to compare with.
        """
        return self.fingerprint == other.fingerprint or self.pieces == other.pieces

    def save(self, folder: str | Path) -> None:
        """Write the name of the model; the vocabulary is part of open_clip.

        Args:
            folder: destination; created if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(json.dumps({"model": self.model}), encoding="utf-8")


def model_config(model: str) -> dict:
    """Return the configuration of an open_clip model.

    Args:
        model: open_clip's name of the model.

    Raises:
        UserError: the model is unknown.
    """
    import open_clip

    known = open_clip.list_models()
    if model not in known:
        raise UserError(f"open_clip has no model {model!r}{suggest(model, known, few=0)}")
    return open_clip.get_model_config(model)


def reads_clip_tokens(model: str) -> bool:
    """Return True if an open_clip model's text tower uses CLIP's byte-pair encoding.

    Args:
        model: open_clip's name of the model.

    Raises:
        UserError: the model is unknown.
    """
    text = model_config(model)["text_cfg"]
    other = text.get("hf_tokenizer_name") or text.get("hf_model_name") or text.get("tokenizer_kwargs")
    return not other and text.get("vocab_size", 49408) == 49408
