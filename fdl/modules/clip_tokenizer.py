"""CLIP's tokenizer, whose vocabulary comes with open_clip: nothing is downloaded."""

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
"""What a tokenizer's name begins with where it is that of an open_clip model."""

TOKENIZER_FILE = "open_clip_tokenizer.json"
"""What `ClipTokenizer.save` writes."""


class ClipTokenizer:
    """The byte-pair encoding of OpenAI's CLIP, which most models of open_clip share.

    It has what `fdl.modules.tokenizers.Tokenizer` has. Texts are cleaned and lower-cased as open_clip does, and encoded
    without the marks of start and end unless these are asked for: a CLIP text tower adds them itself.

    Args:
        model: an open_clip model that reads this encoding; which one does not matter.

    Raises:
        UserError: there is no such model, or it has another tokenizer.
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
        """The ids of a text, at most `limit` of them, with `special` between the marks of start and end."""
        ids = self._tokenizer.encode(text)
        if not special:
            return ids[:limit]
        room = None if limit is None else max(limit - 2, 0)
        return [self.start, *ids[:room], self.eos]

    def encode_batch(self, texts: Sequence[str], special: bool = False, limit: int | None = None) -> list[list[int]]:
        """The ids of many texts; arguments as in `encode`."""
        return [self.encode(text, special, limit) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, in lower case and with single spaces; the marks stand for none."""
        return self._tokenizer.decode([i for i in map(int, ids) if i not in (self.start, self.eos)]).strip()

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each id stands for: bytes of cleaned text by id, a space where a word ends, nothing for the marks."""
        known, table = self._tokenizer.byte_decoder, self._tokenizer.decoder
        pieces = []
        for id in range(self.vocab_size):
            token = "" if id in (self.start, self.eos) else table[id]
            word = token.removesuffix("</w>")
            pieces.append(bytes(known[character] for character in word) + (b" " if word != token else b""))
        return pieces

    def token_bytes(self, ids: Iterable[int]) -> int:
        """How many bytes of cleaned text ids stand for."""
        return sum(len(self.pieces[int(i)]) for i in ids)

    def matches(self, other: Any) -> bool:
        """Whether ids mean the same in both: one fingerprint, or the same bytes behind every id."""
        return self.fingerprint == other.fingerprint or self.pieces == other.pieces

    def save(self, folder: str | Path) -> None:
        """Write its name; open_clip has the vocabulary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(json.dumps({"model": self.model}), encoding="utf-8")


def model_config(model: str) -> dict:
    """The configuration of an open_clip model.

    Raises:
        UserError: open_clip has no such model.
    """
    import open_clip

    known = open_clip.list_models()
    if model not in known:
        raise UserError(f"open_clip has no model {model!r}{suggest(model, known, few=0)}")
    return open_clip.get_model_config(model)


def reads_clip_tokens(model: str) -> bool:
    """Whether an open_clip model's text tower reads CLIP's byte-pair encoding.

    Raises:
        UserError: open_clip has no such model.
    """
    text = model_config(model)["text_cfg"]
    other = text.get("hf_tokenizer_name") or text.get("hf_model_name") or text.get("tokenizer_kwargs")
    return not other and text.get("vocab_size", 49408) == 49408
