"""Tokenizers from files made on the spot, against the libraries that they come from."""

import gzip
import json
import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fdl.errors import UserError
from fdl.modules.tokenizers import ByteTokenizer, Tokenizer, make_tokenizer, own_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve café 😀"] * 5
ODD = "Grüße, 世界!\n\t😀 \x00the  end "


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 300)


def test_bytes_are_utf8_and_one_more_id():
    tokenizer = make_tokenizer("bytes")
    assert tokenizer.encode("né") == [110, 195, 169]
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.decode([110, 195, 169, 256]) == "né"
    assert tokenizer.decode([195]) == "\ufffd"
    assert tokenizer.pieces[:256] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.pieces[256] == b""


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(TEXTS, 300)])
def test_texts_come_back_and_their_bytes_are_counted(make):
    tokenizer = make()
    for text in (*TEXTS[:3], ODD, ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes(ids) == len(text.encode())
        assert b"".join(tokenizer.pieces[id] for id in ids) == text.encode()
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.token_bytes([tokenizer.eos]) == 0


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(TEXTS, 300)])
def test_special_ids_stand_around_a_text_that_is_cut_to_the_limit(make):
    tokenizer = make()
    plain, eos = tokenizer.encode("the cat sat"), tokenizer.eos
    assert tokenizer.encode("the cat sat", special=True) == [eos, *plain, eos]
    assert tokenizer.encode("the cat sat", special=True, limit=4) == [eos, *plain[:2], eos]
    assert tokenizer.encode("the cat sat", limit=2) == plain[:2]
    assert tokenizer.encode_batch(["the cat sat", ""], special=True, limit=3) == [[eos, plain[0], eos], [eos, eos]]


def test_the_fast_bytes_are_those_of_the_file_that_is_saved(tmp_path):
    ByteTokenizer().save(tmp_path)
    loaded = make_tokenizer(str(tmp_path))
    assert not isinstance(loaded, ByteTokenizer)
    assert loaded.fingerprint == ByteTokenizer().fingerprint
    assert loaded.encode(ODD, True) == ByteTokenizer().encode(ODD, True)
    assert (loaded.eos, loaded.pieces) == (256, ByteTokenizer().pieces)


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(bpe, tmp_path):
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (make_tokenizer(str(tmp_path)), make_tokenizer(str(tmp_path / "tokenizer.json"))):
        assert loaded.fingerprint == bpe.fingerprint
        assert loaded.eos == bpe.eos == theirs.eos_token_id
        assert loaded.encode(ODD) == bpe.encode(ODD) == theirs(ODD, add_special_tokens=False).input_ids


def test_fingerprints_tell_tokenizers_apart(bpe):
    fingerprints = {bpe.fingerprint, train_bpe(TEXTS, 265).fingerprint, ByteTokenizer().fingerprint}
    assert len(fingerprints) == 3
    assert train_bpe(TEXTS, 300).fingerprint == bpe.fingerprint
    assert not bpe.matches(ByteTokenizer())


def test_a_trained_vocabulary_has_all_bytes_merges_and_the_end_last(bpe):
    assert bpe.vocab_size <= 300
    assert bpe.eos == bpe.vocab_size - 1
    assert {bytes([byte]) for byte in range(256)} <= set(bpe.pieces)
    assert len(bpe.encode("the cat")) < 7
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(TEXTS, 256)


def test_a_tokenizer_ignores_the_cutting_and_padding_of_its_file(bpe, tmp_path):
    inner = tokenizers.Tokenizer.from_str(bpe.inner.to_str())
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = make_tokenizer(str(tmp_path))
    assert loaded.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
    assert loaded.fingerprint == bpe.fingerprint


def pair(folder: Path, bpe: Tokenizer, names: tuple[str, str], packed: bool = False) -> None:
    """GPT-2's two files: a vocabulary and an ordered list of merges."""
    model = json.loads(bpe.inner.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    vocabulary = {**model["vocab"], "<|endoftext|>": bpe.eos}
    for name, content in zip(names, (json.dumps(vocabulary), "\n".join(merges) + "\n")):
        data = content.encode()
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_vocabulary_and_merges_make_the_tokenizer_again(bpe, tmp_path, names):
    pair(tmp_path, bpe, names)
    for spec in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        loaded = make_tokenizer(str(spec))
        assert loaded.encode(ODD) == bpe.encode(ODD)
        assert loaded.eos == bpe.eos
        assert loaded.matches(bpe)
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match="no such file"):
        make_tokenizer(str(tmp_path / names[0]))


def test_files_may_be_packed_and_have_more_in_their_names(bpe, tmp_path):
    pair(tmp_path, bpe, ("my_encoder.json", "my_vocab.bpe"), packed=True)
    assert make_tokenizer(str(tmp_path / "my_encoder.json.gz")).encode(ODD) == bpe.encode(ODD)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "un", "##aff", "##able", ","]


def test_word_pieces_are_as_in_transformers(tmp_path):
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = make_tokenizer(str(tmp_path))
    theirs = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    text = "The CATS, unaffable dog"
    assert tokenizer.encode(text) == [5, 6, 7, 11, 8, 9, 10, 1]
    assert tokenizer.encode(text, special=True) == theirs(text).input_ids == [2, 5, 6, 7, 11, 8, 9, 10, 1, 3]
    assert tokenizer.encode(text, special=True, limit=4) == [2, 5, 6, 3]
    assert tokenizer.decode([2, 5, 6, 7, 3]) == "the cats"
    assert (tokenizer.vocab_size, tokenizer.eos) == (12, 3)


def test_a_mark_of_the_byte_order_is_no_part_of_a_vocabulary(bpe, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    plain = make_tokenizer(str(tmp_path / "vocab.txt"))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8-sig")
    assert make_tokenizer(str(tmp_path / "vocab.txt")).fingerprint == plain.fingerprint
    bpe.save(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert make_tokenizer(str(tmp_path / "saved")).fingerprint == bpe.fingerprint


def test_a_vocabulary_with_capitals_is_of_a_cased_model(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "The"]) + "\n")
    assert make_tokenizer(str(tmp_path / "vocab.txt")).encode("The the THE") == [12, 5, 1]


def test_pieces_of_sentencepiece_are_text_and_bytes():
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={"<0xC3>": 0, "\u2581the": 1, "x": 2}, merges=[], byte_fallback=True, unk_token="x")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert Tokenizer(inner, None, "test").pieces == [b"\xc3", b" the", b"x"]


def test_what_is_missing_or_broken_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for spec in ("/no/such/place", "./tokenizer.json", "missing.json"):
        with pytest.raises(UserError, match=f"no such file or folder: {spec}"):
            make_tokenizer(spec)
    with pytest.raises(UserError, match="holds no tokenizer"):
        make_tokenizer(str(tmp_path))
    assert own_tokenizer(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        make_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="no vocabulary of BERT"):
        make_tokenizer(str(tmp_path / "vocab.txt"))
    with pytest.raises(UserError, match=r"'nobody/nothing' is no local file .*folder with its tokenizer\.json"):
        make_tokenizer("nobody/nothing")


DATA = os.environ.get("FDL_DATA")


@pytest.mark.skipif(not DATA, reason="FDL_DATA is not set")
def test_gpt2s_and_berts_own_files():
    folder = Path(DATA) / "tokenizers"
    gpt2 = make_tokenizer(str(folder / "gpt2_encoder.json.gz"))
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos, gpt2.decode(gpt2.encode(ODD))) == (50257, 50256, ODD)
    bert = make_tokenizer(str(folder / "bert_base_uncased_vocab.txt.gz"))
    assert bert.encode("Hello world", special=True) == [101, 7592, 2088, 102]
