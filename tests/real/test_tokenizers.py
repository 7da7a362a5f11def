"""Published vocabularies on published text."""

import gzip
import json

import pytest

from fdl.modules.tokenizers import make_tokenizer
from tests.real.data import FOLDER, real

pytestmark = real


def corpus(name: str) -> str:
    with gzip.open(FOLDER / name, "rt", encoding="utf-8", newline="") as file:
        return file.read()


@pytest.mark.parametrize("name", ["tinyshakespeare.txt.gz", "wikitext2_valid.txt.gz"])
def test_gpt2_writes_a_corpus_and_reads_it_back(name):
    tokenizer, text = make_tokenizer(str(FOLDER / "tokenizers/gpt2_encoder.json.gz")), corpus(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes(ids) == len(text.encode())
    assert b"".join(tokenizer.pieces[id] for id in ids) == text.encode()
    if name.startswith("tinyshakespeare"):
        assert len(ids) == 338_025  # nanoGPT counts 301,966 in its training and 36,059 in its validation part


def test_gpt2_saves_what_it_is(tmp_path):
    tokenizer = make_tokenizer(str(FOLDER / "tokenizers/gpt2_vocab.bpe.gz"))
    tokenizer.save(tmp_path)
    again, text = make_tokenizer(str(tmp_path)), corpus("wikitext2_test.txt.gz")[:200_000]
    assert again.matches(tokenizer)
    assert again.eos == tokenizer.eos == 50256
    assert again.encode(text) == tokenizer.encode(text)


def test_bert_writes_what_it_reads_in_lower_case():
    """WordPiece drops spaces: what it reads back has as many characters that are none, in lower case."""
    tokenizer = make_tokenizer(str(FOLDER / "tokenizers/bert_base_uncased_vocab.txt.gz"))
    with gzip.open(FOLDER / "sst2.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:20_000]
    unknown = tokenizer.inner.token_to_id("[UNK]")
    different = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert unknown not in ids
        different += "".join(tokenizer.decode(ids).split()) != "".join(text.lower().split())
    assert different < 0.01 * len(texts)  # accents are dropped
