"""Tokenizers: bytes, any file of the `tokenizers` library, and those of the Hugging Face hub.

Each wraps a `tokenizers.Tokenizer`, so that all are saved, fingerprinted and compared in the same way.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import PREFIX, TOKENIZER_FILE, ClipTokenizer
from fdl.modules.hub import hub_or_cache

END = "<|endoftext|>"
_EOS_KEYS = ("eos_token", "sep_token")
# file names of the vocabulary and merges of byte-level BPE, of GPT-2's authors and of the hub
_PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}


class Tokenizer:
    """Conversion between text and token ids.

    Args:
        inner: tokenizer of the `tokenizers` library.
        eos: id of the end-of-text token; None if the vocabulary has none.
        label: name of the tokenizer in error messages.

    Attributes:
        vocab_size: one more than the largest id.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eos: int | None, label: str):
        inner.no_truncation()
        inner.no_padding()
        self.inner, self.eos, self.label = inner, eos, label
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, special: bool = False, limit: int | None = None) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any text.
            special: add the tokens that the tokenizer's models expect around a text, e.g. ``[CLS]`` and ``[SEP]``. For
                classification; windows of language models do not have them.
            limit: maximum number of ids, including special ones; the end of the text is cut off.
        """
        return self.encode_batch([text], special, limit)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False, limit: int | None = None) -> list[list[int]]:
        """Return the ids of several texts, using all cores if the tokenizer supports it.

        Args:
            texts: texts to encode.
            special: add the tokens that the tokenizer's models expect around a text.
            limit: maximum number of ids per text, including special ones.
        """
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        around = self.inner.num_special_tokens_to_add(False) if special else 0
        if limit is not None:
            for encoding in encodings:
                encoding.truncate(max(limit - around, 0))
        if around:
            encodings = [self.inner.post_process(encoding, add_special_tokens=True) for encoding in encodings]
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens. Bytes that are not valid UTF-8 become U+FFFD.

        Args:
            ids: token ids.
        """
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def pieces(self) -> list[bytes]:
        """UTF-8 bytes of each id; empty for special ids and for unused ids."""
        decoder = json.loads(self.inner.to_str())["decoder"]
        kinds = {part["type"] for part in _decoder_parts(decoder)}
        special = {id for id, token in self.inner.get_added_tokens_decoder().items() if token.special}
        pieces = [b""] * self.vocab_size
        for token, id in self.inner.get_vocab(with_added_tokens=True).items():
            if id not in special:
                pieces[id] = _token_bytes(token, kinds)
        for id, token in self.inner.get_added_tokens_decoder().items():
            if id not in special:
                pieces[id] = token.content.encode()
        return pieces

    def token_bytes(self, ids: Iterable[int]) -> int:
        """Return the number of bytes of text that ids represent.

        Args:
            ids: token ids.
        """
        return sum(len(self.pieces[int(i)]) for i in ids)

    @cached_property
    def fingerprint(self) -> str:
        """Hash that is equal for tokenizers that encode texts identically, regardless of their origin."""
        content = json.loads(self.inner.to_str())
        kept = {key: content[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()

    def matches(self, other: Tokenizer) -> bool:
        """Return True if ids mean the same in both: their fingerprints or the bytes of all ids are equal.

        Args:
            other: tokenizer to compare with.
        """
        return self.fingerprint == other.fingerprint or self.pieces == other.pieces

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and its settings, for `make_tokenizer` and transformers' AutoTokenizer.

        Args:
            folder: destination; created if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.inner.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.eos is not None:
            settings["eos_token"] = self.inner.id_to_token(self.eos)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """Tokenizer of UTF-8 bytes, ids 0 to 255, with id 256 for the end of a text.

    The inner tokenizer computes the same more slowly; it is used for the fingerprint and for saving.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("Hi")
        [72, 105]
    """

    def __init__(self) -> None:
        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        super().__init__(_byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False), 256, "bytes")

    def encode_batch(self, texts: Sequence[str], special: bool = False, limit: int | None = None) -> list[list[int]]:
        """Return the ids of several texts, see `Tokenizer.encode_batch`."""
        room = None if limit is None else max(limit - (2 if special else 0), 0)
        bodies = [list(text.encode()[:room]) for text in texts]
        return [[256, *body, 256] for body in bodies] if special else bodies

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, see `Tokenizer.decode`.

        Args:
            ids: token ids.
        """
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


def make_tokenizer(spec: str) -> Tokenizer | ClipTokenizer:
    """Create a tokenizer from its specification in a recipe.

    Args:
        spec: ``"bytes"``; ``"open_clip:<model>"``; a local folder in the format of transformers or `Tokenizer.save`, or
            with GPT-2's ``encoder.json`` and ``vocab.bpe``; a single file: ``tokenizer.json``, one of GPT-2's two, or
            BERT's ``vocab.txt`` (vocabulary files may be gzipped, and their names may have a prefix); or an id of the
            Hugging Face hub, downloaded or from the cache.

    Raises:
        UserError: the file does not exist or contains no tokenizer, or the hub does not provide it.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith(PREFIX):
        return ClipTokenizer(spec.removeprefix(PREFIX))
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    if path.is_absolute() or spec.startswith(("./", "../", "~")) or path.suffix in (".json", ".txt", ".bpe", ".gz"):
        raise UserError(f"tokenizer: no such file or folder: {spec}")
    return _from_hub(spec)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path | None = None) -> Tokenizer:
    """Train byte-level BPE, GPT-2's kind of tokenizer, with ``<|endoftext|>`` as its last id.

    Args:
        texts: training texts.
        vocab_size: number of ids, at least 257: all bytes and the end of a text.
        folder: folder in which the tokenizer is saved; None: not saved.

    Raises:
        UserError: `vocab_size` is too small.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size must be at least 257, for 256 bytes and the end of a text, got {vocab_size}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner = _byte_level(inner.model)
    tokenizer = Tokenizer(inner, inner.token_to_id(END), "trained BPE")
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def own_tokenizer(model: str) -> Tokenizer | None:
    """Return the tokenizer stored with a model's weights; None for a local folder without one.

    Args:
        model: local folder or id of the hub.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() and not any(path for name in ("*token*", "*vocab*", "*.model") for path in folder.glob(name)):
        return None
    return make_tokenizer(model)


def require_own_tokenizer(model: str, tokenizer: Tokenizer, hint: str = "") -> None:
    """Check that a pretrained model was trained with the data's tokenizer.

    Args:
        model: local folder or id of the hub.
        tokenizer: tokenizer of the data.
        hint: alternative to the model's own tokenizer, appended to the error message.

    Raises:
        UserError: the model has a different tokenizer.
    """
    own = own_tokenizer(model)
    if own is not None and not own.matches(tokenizer):
        raise UserError(
            f"model: {model} was trained with another tokenizer ({own.vocab_size} tokens) than the data's "
            f"({tokenizer.label}, {tokenizer.vocab_size} tokens); give the data tokenizer: {model}{hint}"
        )


def _byte_level(model: models.BPE, use_regex: bool = True) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer with one special token that starts and ends a text."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    end = (END, inner.token_to_id(END))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", pair=f"{END} $A {END} $B {END}", special_tokens=[end]
    )
    return inner


def _word_piece(path: Path) -> Tokenizer:
    """Return BERT's tokenizer from a list of word pieces; without capital letters it is lower-casing (uncased)."""
    words = _read_text(path).splitlines()
    vocabulary = {word: id for id, word in enumerate(words)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise UserError(f"tokenizer: {path} is no vocabulary of BERT: it has no {' or '.join(missing)}")
    cased = any(word != word.lower() for word in words if not word.startswith("["))
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocabulary])
    cls, sep = (("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"]))
    inner.post_processor = processors.BertProcessing(sep, cls)
    return Tokenizer(inner, sep[1], str(path))


def _from_folder(folder: Path) -> Tokenizer | ClipTokenizer:
    if (folder / "tokenizer.json").is_file():
        return _from_file(folder / "tokenizer.json")
    if (folder / TOKENIZER_FILE).is_file():
        return ClipTokenizer(json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8-sig"))["model"])
    for vocabulary in _PAIRS:
        if (folder / vocabulary).is_file():
            return _from_file(folder / vocabulary)
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.model", "spiece.model")):
        return _by_transformers(str(folder))
    if (folder / "vocab.txt").is_file():
        return _from_file(folder / "vocab.txt")
    raise UserError(f"tokenizer: {folder} holds no tokenizer.json, vocab.txt, or vocabulary with merges")


def _from_file(path: Path) -> Tokenizer:
    name = path.name.removesuffix(".gz")
    if name.endswith("vocab.txt"):
        return _word_piece(path)
    for vocabulary, merges in _PAIRS.items():
        if name.endswith((vocabulary, merges)):
            stem, end = name.removesuffix(vocabulary).removesuffix(merges), path.name[len(name) :]
            return _byte_pairs(path.with_name(stem + vocabulary + end), path.with_name(stem + merges + end))
    try:
        inner = tokenizers.Tokenizer.from_str(_read_text(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"tokenizer: {path} is no tokenizer.json of the tokenizers library: {error}") from error
    return Tokenizer(inner, _eos(inner, path.parent), str(path.parent if path.name == "tokenizer.json" else path))


def _byte_pairs(vocabulary: Path, merges: Path) -> Tokenizer:
    for path in (vocabulary, merges):
        if not path.is_file():
            raise UserError(f"tokenizer: no such file: {path}; vocabulary and merges lie side by side")
    lines = [line for line in _read_text(merges).splitlines() if line and not line.startswith("#version")]
    try:
        ids = json.loads(_read_text(vocabulary))
        model = models.BPE(vocab=ids, merges=[tuple(line.split(" ")) for line in lines])
    except Exception as error:
        raise UserError(f"tokenizer: {vocabulary} and {merges.name} are no byte-level BPE: {error}") from error
    inner = _byte_level(model)
    return Tokenizer(inner, inner.token_to_id(END), str(vocabulary))


def _eos(inner: tokenizers.Tokenizer, folder: Path) -> int | None:
    """Return the id that ends a text, from the settings next to the file, or of the name that fdl's tokenizers use."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text(encoding="utf-8-sig"))
            found = next((settings[key] for key in _EOS_KEYS if settings.get(key)), None)
            if found is not None:
                return inner.token_to_id(found["content"] if isinstance(found, dict) else found)
    return inner.token_to_id(END)


def _from_hub(spec: str) -> Tokenizer:
    try:
        with hub_or_cache() as why:
            return _by_transformers(spec)
    except (OSError, ValueError, RuntimeError) as error:
        reason = why or str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer: {spec!r} is no local file or folder, and the Hugging Face hub does not give it ({reason}); "
            "give the path of a folder with its tokenizer.json instead"
        ) from error


def _by_transformers(spec: str) -> Tokenizer:
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(spec)
    inner = getattr(slow, "backend_tokenizer", None)
    if inner is None:
        raise UserError(f"tokenizer: {spec} has no fast tokenizer; convert it to a tokenizer.json")
    eos = slow.eos_token_id if slow.eos_token_id is not None else slow.sep_token_id
    return Tokenizer(inner, eos, spec)


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer: {path} cannot be read: {error}") from error


def _byte_characters() -> list[str]:
    """Return the printable character with which byte-level BPE represents each byte.

    Printable bytes of Latin-1 represent themselves; all others are mapped, in order, to characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(_byte_characters())}


def _token_bytes(token: str, decoders: set[str]) -> bytes:
    """Return the bytes of a token in the notation of its vocabulary."""
    if "ByteLevel" in decoders and all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    if "WordPiece" in decoders:
        return token.removeprefix("##").encode() if token.startswith("##") else b" " + token.encode()
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:  # SentencePiece's bytes
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _decoder_parts(part: Any) -> list[dict]:
    """Return a decoder, or the decoders of a sequence, as a list."""
    if part is None:
        return []
    return (
        [one for inner in part["decoders"] for one in _decoder_parts(inner)] if part["type"] == "Sequence" else [part]
    )
