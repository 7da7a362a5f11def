"""Bytes against a vocabulary with two merges, where everything can be worked out by hand."""

import math

import pytest
import torch
from tokenizers import models

from fdl.errors import UserError
from fdl.modules.aligner import AlignedLanguageModel, BoundaryAligner
from fdl.modules.tokenizers import Tokenizer, _byte_characters, _byte_level, make_tokenizer
from tests.modules.makers import quiet_trainer
from tests.modules.text_models import BYTES, DECODERS, padded, saved

ALIGNER = BoundaryAligner()


def merged(*merges: tuple[str, str]) -> Tokenizer:
    """Bytes as in GPT-2, and these merges after them; the end of a text is last."""
    tokens = [*_byte_characters(), *("".join(merge) for merge in merges)]
    inner = _byte_level(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=list(merges)))
    return Tokenizer(inner, len(tokens), "merged")


WORDS = merged(("t", "h"), ("th", "e"))
TH, THE, END = 256, 257, 258


def of_bytes(text: str | bytes) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)


def test_a_model_of_words_on_windows_of_bytes():
    tokens = padded([of_bytes("the cat"), [*of_bytes("th"), 256, *of_bytes("ea")]])
    own, positions, owners = ALIGNER.align(tokens, BYTES, WORDS)
    assert own.tolist() == [[THE, *of_bytes(" cat")], [TH, END, *of_bytes("ea"), -1]]
    assert positions.tolist() == [[-1, -1, 0, 1, 2, 3, 4], [-1, 0, 1, 2, 3, -1, -1]]
    assert owners.tolist() == [[2, 3, 4, 5, 6], [1, 2, 3, 4, -1]]
    translation = ALIGNER.translate(BYTES, WORDS)
    assert translation.tolist() == [*range(256), ord("t"), ord("t"), 256]


def test_a_model_of_bytes_on_windows_of_words():
    tokens = padded([WORDS.encode("the cat")])
    own, positions, owners = ALIGNER.align(tokens, WORDS, BYTES)
    assert own.tolist() == [of_bytes("the cat")]
    assert positions.tolist() == [[2, 3, 4, 5, 6]]
    assert owners.tolist() == [[0, 0, 0, 1, 2, 3, 4]]
    assert ALIGNER.translate(WORDS, BYTES).tolist() == [*range(256), END]


def test_a_token_counts_as_the_first_that_the_data_would_write_for_it():
    """One vocabulary knows "the", the other "he": "the" begins with "t" there, and "he" with "h" here."""
    other = merged(("h", "e"))
    assert ALIGNER.translate(WORDS, other).tolist() == [*range(256), ord("h"), END]
    assert ALIGNER.translate(other, WORDS).tolist() == [*range(256), ord("t"), ord("t"), 257]
    # half of a character is no text, but it may be a token all the same
    halves = merged(("Ã", "©"))  # the two bytes of é
    assert halves.pieces[256] == "é".encode()
    assert ALIGNER.translate(BYTES, halves).tolist() == [*range(256), 0xC3, 256]


def test_halves_of_characters_at_a_windows_ends_are_left_out():
    tokens = padded([of_bytes("é".encode()[1:] + b"the" + "é".encode()[:1])])
    own, positions, owners = ALIGNER.align(tokens, BYTES, WORDS)
    assert own.tolist() == [[THE]]
    assert positions.tolist() == [[-1, -1, -1, 0, -1]]
    assert owners.tolist() == [[3]]


def test_a_tokenizer_that_changes_the_text_answers_nothing_and_loses_nothing(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    own, positions, owners = ALIGNER.align(padded([of_bytes("The cat")]), BYTES, make_tokenizer(str(tmp_path)))
    assert own.tolist() == [[4, 5]]
    assert positions.tolist() == [[-1] * 7]
    assert owners.tolist() == [[6, 6]]


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> AlignedLanguageModel:
    folder = tmp_path_factory.mktemp("words")
    WORDS.save(folder)
    torch.manual_seed(0)
    return AlignedLanguageModel(
        "llama",
        config=DECODERS["llama"],
        own_tokenizer=str(folder),
        own_context=32,
        chunk=3,
        tokenizer=BYTES,
        context=16,
    ).eval()


WINDOWS = padded([of_bytes("the cat the"), of_bytes("see th")])


def own_logits(module: AlignedLanguageModel, text: str) -> torch.Tensor:
    return module.network(input_ids=torch.tensor([WORDS.encode(text)])).logits[0]


def of_first_bytes(own: torch.Tensor) -> torch.Tensor:
    """What a distribution over own tokens says of the next byte, and of the end."""
    p = own[[*range(256), END]]
    p[ord("t")] += own[TH] + own[THE]
    return p


def test_answers_are_the_models_own_for_what_its_tokens_begin_with(module):
    ids, p, valid = module.top_predictions(WINDOWS, 257)
    assert valid.tolist() == [
        [False, False, True, True, True, True, True, True, False, False, True],
        [True, True, True, True, False, True, *[False] * 5],
    ]
    own = own_logits(module, "the cat the").softmax(-1)
    for position, place in ((2, 0), (3, 1), (10, 6)):
        answered = torch.zeros(257).scatter_(0, ids[0, position], p[0, position])
        torch.testing.assert_close(answered, of_first_bytes(own[place]))
    assert bool((p[valid][:, :-1] >= p[valid][:, 1:]).all())
    assert bool((ids[~valid] == -1).all())
    assert bool((p[~valid] == 0).all())


def test_few_answers_are_the_likeliest_of_many(module):
    many, few = module.top_predictions(WINDOWS, 257), module.top_predictions(WINDOWS, 4)
    assert torch.equal(few[0], many[0][..., :4])
    assert torch.equal(few[1], many[1][..., :4])


def test_what_stands_for_no_text_is_left_for_the_tail(tmp_path):
    """A model with more logits than its tokenizer has tokens, as many have, to make their number a round one."""
    WORDS.save(tmp_path)
    torch.manual_seed(0)
    module = AlignedLanguageModel(
        "llama",
        config={**DECODERS["llama"], "vocab_size": 300},
        own_tokenizer=str(tmp_path),
        own_context=32,
        tokenizer=BYTES,
        context=16,
    ).eval()
    draws, own = 20_000, own_logits(module, "the").detach().softmax(-1)[0]
    rest = float(own[259:].sum())
    assert rest > 0.1
    ids, p, valid = module.top_predictions(WINDOWS[:1, :3], 257)
    assert valid.tolist() == [[False, False, True]]
    assert float(p[0, 2].sum()) == pytest.approx(1 - rest, abs=1e-5)
    ids, seen, _ = module.sampled_predictions(WINDOWS[:1, :3], draws, torch.Generator().manual_seed(0))
    expected = of_first_bytes(own)
    frequencies = torch.zeros(257).scatter_add_(0, ids[0, 2].clamp_min(0), seen[0, 2])
    assert bool(((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4).all())
    assert float(seen[0, 2].sum()) == pytest.approx(1 - rest, abs=0.01)
    used = ids[0, 2] >= 0
    assert bool((used[:-1] >= used[1:]).all())


def test_the_likelihood_of_a_window_is_that_of_the_models_own_tokens(module):
    nll = module.token_nll(WINDOWS)
    assert nll.shape == (2, 10)
    own = torch.tensor(WORDS.encode("the cat the"))
    expected = -own_logits(module, "the cat the").log_softmax(-1)[:-1].gather(1, own[1:, None])[:, 0]
    # " ", "c", "a", "t", " ", "the": bytes 3 to 7 and 10, of which the table's first column is byte 1
    torch.testing.assert_close(nll[0, [2, 3, 4, 5, 6, 9]], expected)
    assert float(nll[0].detach().sum()) == pytest.approx(float(expected.detach().sum()), rel=1e-5)
    assert bool((nll[1, 5:] == 0).all())
    loss = module.training_step((WINDOWS, None))["loss"]
    counts = len(own) - 1 + len(WORDS.encode("see th")) - 1
    torch.testing.assert_close(loss, nll.sum() / counts)


def test_windows_that_are_too_long_are_read_in_pieces():
    torch.manual_seed(0)
    module = AlignedLanguageModel(
        "gpt2", config=DECODERS["gpt2"], own_tokenizer="bytes", own_context=4, tokenizer=WORDS, context=6
    ).eval()
    tokens = padded([WORDS.encode("the cat")])  # seven bytes: "the " and "cat"
    ids, p, valid = module.top_predictions(tokens, 300)
    assert valid.tolist() == [[True] * 5]
    for piece, place, position in (("the ", 2, 0), ("the ", 3, 1), ("cat", 0, 2), ("cat", 2, 4)):
        own = module.network(input_ids=torch.tensor([of_bytes(piece)])).logits[0, place].softmax(-1)
        used = ids[0, position] >= 0
        torch.testing.assert_close(p[0, position][used], own[ids[0, position][used].clamp_max(256)])
        assert int(used.sum()) == 257
    assert module(tokens).embedding.shape == (1, 16)


def test_a_model_with_its_own_tokenizer_trains_on_the_datas_windows(tmp_path):
    torch.manual_seed(0)
    source = AlignedLanguageModel(
        "gpt2",
        config=DECODERS["gpt2"],
        own_tokenizer="bytes",
        own_context=20,
        tokenizer=WORDS,
        context=8,
    )
    module = AlignedLanguageModel(
        saved(source, tmp_path),
        pretrained=True,
        tokenizer=WORDS,
        context=8,
        optimizer={"target": "adam", "args": {"lr": 0.01}},
    )
    tokens = padded([WORDS.encode("the cat")] * 8)
    loader = torch.utils.data.DataLoader([(row, 0) for row in tokens], batch_size=4)
    trainer = quiet_trainer(max_epochs=30)
    trainer.fit(module, loader, loader)
    assert float(trainer.callback_metrics["validation/loss"]) < 0.3 * math.log(257)
    module.eval()
    ids, _, valid = module.top_predictions(tokens[:1], 1)
    assert bool(valid.all())
    assert ids[0, 1:4, 0].tolist() == of_bytes("cat")
    continued = module.generate(padded([WORDS.encode("the ")]), 3)
    assert WORDS.decode(continued[0].tolist()) == "cat"


def test_what_it_cannot_do_is_said(module, tmp_path):
    with pytest.raises(UserError, match="own_tokenizer: missing"):
        AlignedLanguageModel("gpt2", config=DECODERS["gpt2"], tokenizer=BYTES, context=8)
    with pytest.raises(UserError, match="no hidden states for the data's tokens"):
        module.hidden(WINDOWS)
