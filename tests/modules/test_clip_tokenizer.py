"""CLIP's tokenizer against open_clip's own."""

import open_clip
import pytest
import torch

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.tokenizers import ByteTokenizer, make_tokenizer

TEXTS = ["A photo of  a Café, 3 dogs!", "l'été &amp; 'it's", "x", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("open_clip:ViT-B-16")


def test_ids_are_open_clips(tokenizer):
    expected = open_clip.tokenize(TEXTS)
    for text, row in zip(TEXTS, expected):
        ids = tokenizer.encode(text, special=True)
        assert row[: len(ids)].tolist() == ids and row[len(ids) :].abs().sum() == 0
        assert tokenizer.encode(text) == ids[1:-1]
    assert tokenizer.encode_batch(TEXTS, special=True, limit=4)[0] == [49406, *tokenizer.encode(TEXTS[0])[:2], 49407]
    assert tokenizer.encode(TEXTS[0], limit=3) == tokenizer.encode(TEXTS[0])[:3]
    assert (tokenizer.vocab_size, tokenizer.eos) == (49408, 49407)


def test_ids_stand_for_the_cleaned_text(tokenizer):
    ids = tokenizer.encode(TEXTS[0], special=True)
    assert tokenizer.decode(torch.tensor(ids)) == "a photo of a café , 3 dogs !"
    assert tokenizer.token_bytes(ids) == len("a photo of a café , 3 dogs ! ".encode())


def test_one_encoding_whatever_the_model(tokenizer, tmp_path):
    other = ClipTokenizer("RN50")
    assert tokenizer.fingerprint == other.fingerprint and tokenizer.matches(other)
    assert not tokenizer.matches(ByteTokenizer())
    other.save(tmp_path / "saved")
    again = make_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == other.fingerprint and again.model == "RN50"


def test_unknown_models_and_other_encodings_are_refused():
    with pytest.raises(UserError, match="open_clip has no model 'ViT-B32'; did you mean 'ViT-B-32'"):
        make_tokenizer("open_clip:ViT-B32")
    with pytest.raises(UserError, match="does not read CLIP's byte-pair encoding"):
        ClipTokenizer("ViT-B-16-SigLIP")
