"""Language metrics against formulas by hand and torchmetrics, with padding and whatever the batches."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.text import Perplexity

from fdl.datamodules.text import TextSamples
from fdl.metrics.language import language, token_scores
from fdl.modules.tokenizers import ByteTokenizer
from tests.evaluators.models import Bigram
from tests.evaluators.worlds import server

EVERY = ["nll", "perplexity", "bits_per_byte", "token_accuracy"]
TOKENIZER = ByteTokenizer()


def windows(texts, width=None):
    ids = [list(text.encode()) if isinstance(text, str) else text for text in texts]
    width = max(map(len, ids)) if width is None else width
    return TextSamples(np.array([i for row in ids for i in row], dtype=np.int32), list(map(len, ids)), width=width)


def measure(module, samples, names=EVERY, batch_size=512, tokenizer=TOKENIZER):
    asked = server(samples, task="language", model_kwargs={"tokenizer": tokenizer}, batch_size=batch_size)
    return language(asked, module, samples, names)


@pytest.fixture(scope="module")
def model():
    return Bigram(torch.randn(257, 257, generator=torch.Generator().manual_seed(0)))


def test_a_model_whose_probabilities_are_known_by_hand():
    """After token 0 come 0 and 1 with 3/4 and 1/4, after token 1 alike; so 0→0→1→1→0 costs ln 4/3 + ln 4 + 2 ln 2."""
    module = Bigram([[math.log(3), 0.0], [0.0, 0.0]])
    got = measure(module, windows([[0, 0, 1, 1, 0]]))
    nll = (math.log(4 / 3) + math.log(4) + 2 * math.log(2)) / 4
    assert got["nll"] == pytest.approx(nll, rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(nll / math.log(2), rel=1e-6)  # one byte a token
    assert got["token_accuracy"] == 0.5  # 0→0 and 1→0 (a tie goes to the first) are right


def test_padding_does_not_count_and_every_token_counts_alike(model):
    texts = ["federated", "ab", "", "distillation of models", "x"]
    samples = windows(texts, width=30)
    got = measure(model, samples, batch_size=2)
    logits = model(torch.tensor([list(t.encode()) + [0] * (30 - len(t)) for t in texts])).logits.detach()
    targets = torch.tensor([list(t.encode()) + [-1] * (30 - len(t)) for t in texts])
    perplexity = Perplexity(ignore_index=-1)
    perplexity.update(logits[:, :-1], targets[:, 1:])
    hits = [logits[i, t].argmax() == b for i, text in enumerate(texts) for t, b in enumerate(text.encode()[1:])]
    assert got["perplexity"] == pytest.approx(float(perplexity.compute()), rel=1e-5)
    assert got["nll"] == pytest.approx(math.log(got["perplexity"]), rel=1e-6)
    assert got["token_accuracy"] == pytest.approx(float(torch.stack(hits).float().mean()))
    assert len(hits) == 8 + 1 + 21


@pytest.mark.parametrize("batch_size", [1, 3, 512])
def test_batches_do_not_matter(model, batch_size):
    samples = windows(["one", "sixteen letters.", "four", "a few more"])
    assert measure(model, samples, batch_size=batch_size) == pytest.approx(measure(model, samples, batch_size=2))


def test_the_nll_is_the_same_with_and_without_accuracy(model):
    samples = windows(["one", "sixteen letters.", "four"])
    assert measure(model, samples, ["nll"])["nll"] == pytest.approx(measure(model, samples)["nll"], rel=1e-6)


def test_bits_per_byte_counts_bytes_and_not_tokens(model):
    class Two:
        """As if every id stood for two bytes, and id 256 for none."""

        def token_bytes(self, ids):
            return sum(2 for i in ids if i != 256)

    samples = windows([[1, 2, 256, 3]])
    got = measure(model, samples, ["nll", "bits_per_byte"], tokenizer=Two())
    assert got["bits_per_byte"] == pytest.approx(3 * got["nll"] / math.log(2) / 4)


def test_logits_are_made_a_few_positions_at_a_time(model, monkeypatch):
    tokens = windows(["sixteen letters.", "four", "a"]).batch(torch.arange(3))[0]
    whole = token_scores(model, tokens)
    monkeypatch.setattr("fdl.metrics.language._TOKENS", 4)
    most = []
    model.head.register_forward_hook(lambda _, inputs, output: most.append(len(output)))
    torch.testing.assert_close(token_scores(model, tokens), whole)
    assert max(most) == 4 and sum(most) == 15 + 3


def test_nothing_predicted_is_nan(model):
    for samples in (windows([], width=4), windows([[7], [8]])):
        got = measure(model, samples)
        assert list(got) == EVERY
        assert all(math.isnan(value) for value in got.values())


def test_a_model_that_has_diverged():
    sure = Bigram([[1000.0, 0.0], [0.0, 0.0]])
    got = measure(sure, windows([[0, 1]]))
    assert (got["nll"], got["perplexity"]) == (1000.0, math.inf)
    lost = measure(Bigram([[math.nan, 0.0], [0.0, 0.0]]), windows([[0, 1]]))
    assert math.isnan(lost["nll"]) and math.isnan(lost["perplexity"])


def test_a_model_of_transformers():
    from fdl.modules.language_model import LanguageModel

    torch.manual_seed(0)
    config = {"n_layer": 1, "n_embd": 16, "n_head": 2}
    module = LanguageModel("gpt2", config=config, tokenizer=TOKENIZER, context=20)
    texts = ["federated", "distillation of m", "xy"]
    samples = windows(texts, width=20)
    got = measure(module, samples, batch_size=2)
    losses, hits = [], []
    for text in texts:  # one by one, without padding
        tokens = torch.tensor([list(text.encode())])
        logits = module.eval().network(input_ids=tokens).logits[0, :-1].detach().double()
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
        hits.append(logits.argmax(1) == tokens[0, 1:])
    nll = float(torch.cat(losses).mean())
    assert got["nll"] == pytest.approx(nll, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nll / math.log(2), rel=1e-5)
    assert got["token_accuracy"] == pytest.approx(float(torch.cat(hits).double().mean()))
    assert measure(module, samples, ["nll"])["nll"] == pytest.approx(nll, rel=1e-5)
    for precision in ("bf16-mixed", "bf16-true"):
        asked = server(samples, task="language", model_kwargs={"tokenizer": TOKENIZER}, precision=precision)
        rounded = language(asked, asked.runtime.place(module), samples, EVERY)
        assert rounded["nll"] == pytest.approx(nll, rel=0.02)
