"""Generation with a model that recites, against sentences whose scores are known."""

import numpy as np
import pytest
import torch

from fdl.datamodules.text import TextSamples
from fdl.errors import UserError
from fdl.evaluators.continuation import continuations
from fdl.evaluators.generation import Generation
from fdl.modules.tokenizers import ByteTokenizer
from tests.evaluators.models import Bigram
from tests.evaluators.worlds import server


class Words:
    """A word a token: w0, w1, …, and 256 as the end of a text."""

    eos = 256

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids if i != self.eos)


def cycle(step=1, size=257):
    """After token i always comes i + step."""
    return Bigram(torch.roll(torch.eye(size), step, dims=1))


def world(rows, tokenizer=None, width=None):
    samples = TextSamples(np.concatenate(rows).astype(np.int32), [len(row) for row in rows], width=width)
    return server(samples, task="language", model_kwargs={"tokenizer": tokenizer or Words(), "context": 24})


def rows(*starts, length=24):
    return [np.arange(start, start + length) for start in starts]


def test_the_true_continuation_scores_one():
    got = Generation(prompt_tokens=8, new_tokens=16).evaluate(world(rows(0, 100, 200)), cycle())
    assert got == {"bleu": 1.0, "rouge_1": 1.0, "rouge_2": 1.0, "rouge_l": 1.0}


def test_another_text_scores_nothing():
    got = Generation(prompt_tokens=8, new_tokens=16).evaluate(world(rows(0)), cycle(step=100))
    assert got["bleu"] == 0 and got["rouge_2"] == 0 and got["rouge_1"] < 0.1


def test_scores_by_hand():
    """The model says w3 w4 w5 w6 where w3 w4 w9 w6 is right: 3 of 4 words, 1 of 3 pairs, and w3 w4 w6 in order."""
    got = Generation(prompt_tokens=3, new_tokens=4).evaluate(world([np.array([0, 1, 2, 3, 4, 9, 6])]), cycle())
    assert got["rouge_1"] == pytest.approx(3 / 4)
    assert got["rouge_2"] == pytest.approx(1 / 3)
    assert got["rouge_l"] == pytest.approx(3 / 4)
    assert got["bleu"] == 0  # no three words in a row
    long = np.concatenate([np.arange(9), [99, 10, 11]])
    got = Generation(prompt_tokens=2, new_tokens=10).evaluate(world([long]), cycle())
    precisions = [9 / 10, 7 / 9, 5 / 8, 4 / 7]
    assert got["bleu"] == pytest.approx(np.prod(precisions) ** 0.25, rel=1e-5)


def test_both_texts_stop_where_a_document_ends():
    ends = np.concatenate([np.arange(250, 257), np.arange(5)])
    got = Generation(prompt_tokens=2, new_tokens=10).evaluate(world([ends]), cycle())
    assert got["rouge_1"] == 1.0
    with pytest.raises(UserError, match="no window of the test set has 12 tokens"):
        Generation(prompt_tokens=6, new_tokens=6).prepare(world([ends]))  # it ends with the prompt


def test_windows_are_drawn_once_and_short_ones_left_out():
    whole = world([*rows(*range(0, 40, 2)), np.arange(5)], width=24)
    drawn = Generation(samples=6, prompt_tokens=8, new_tokens=16)._windows(whole)
    assert len(drawn) == 6 == len({row[0] for row in drawn})
    assert drawn == Generation(samples=6, prompt_tokens=8, new_tokens=16)._windows(whole)
    assert len(Generation(prompt_tokens=8, new_tokens=16)._windows(whole)) == 20
    with pytest.raises(UserError, match="no window of the test set has 25 tokens"):
        Generation(prompt_tokens=9, new_tokens=16).prepare(whole)


def test_prompts_of_many_lengths_are_continued_in_their_order(monkeypatch):
    monkeypatch.setattr("fdl.evaluators.continuation._BATCH", 2)
    prompts = [[1, 2, 3], [250], [7, 8], [254, 255], [4]]
    got = continuations(world(rows(0)), cycle(), prompts, 3)
    assert got == [[4, 5, 6], [251, 252, 253], [9, 10, 11], [], [5, 6, 7]]


def test_a_model_without_room_and_data_without_a_tokenizer():
    narrow = world(rows(0))
    narrow.student = cycle()
    narrow.student.positions = 16
    with pytest.raises(UserError, match="generation: new_tokens must be below the student's 16 positions, got 16"):
        Generation(prompt_tokens=8, new_tokens=16).prepare(narrow)
    narrow.model_kwargs = {}
    with pytest.raises(UserError, match="generation needs data with a tokenizer"):
        Generation().prepare(narrow)


def test_a_model_of_transformers_recites_what_it_was_taught():
    from fdl.modules.language_model import LanguageModel

    tokenizer = ByteTokenizer()
    text = "the quick brown fox jumps over the lazy dog and runs away. "
    ids = np.array(tokenizer.encode(text * 4))
    torch.manual_seed(0)
    config = {"n_layer": 1, "n_embd": 32, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    module = LanguageModel("gpt2", config=config, tokenizer=tokenizer, context=48)
    taught = [ids[start : start + 48] for start in range(0, 60, 6)]
    asked = world(taught, tokenizer)
    asked.student = module
    probe = Generation(samples=4, prompt_tokens=16, new_tokens=32)
    probe.prepare(asked)
    before = probe.evaluate(asked, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    tokens = torch.tensor(np.stack(taught))
    for _ in range(120):
        optimizer.zero_grad()
        module.train().training_step((tokens, None))["loss"].backward()
        optimizer.step()
    after = probe.evaluate(asked, module)
    assert before["rouge_1"] < 0.2
    assert after["rouge_1"] > 0.8
    assert after["bleu"] > 0.5
