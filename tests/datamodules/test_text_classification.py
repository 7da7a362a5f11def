import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn

from fdl.datamodules.partition import ByGroup, Dirichlet
from fdl.datamodules.text_classification import TextClassification, _fitted
from fdl.datamodules.text_files import TextFiles
from fdl.errors import UserError
from fdl.modules.tokenizers import make_tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "good", "bad", "film", "play")


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(data, samples):
    tokens, _ = samples.batch(torch.arange(len(samples)))
    return [data.tokenizer.decode([t for t in row if t >= 0]) for row in tokens.tolist()]


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return str(tmp_path / "vocab.txt")


def ids(*words):
    return [WORDS.index(word) for word in words]


def reviews(path, count=60):
    rows = [
        {"text": f"{'good' if i % 2 else 'bad'} {'film' if i % 3 else 'play'} {'a b ' * (i % 5)}", "label": i % 2}
        for i in range(count)
    ]
    return jsonl(path, [{**row, "kind": row["text"].split()[1]} for row in rows])


# -- what a batch holds ------------------------------------------------------------------------------------------


def test_bytes_between_marks_of_start_and_end(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", [{"text": "aé", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 0}]
    )
    data = ready(TextClassification(path, context=8, test=1))
    assert data.model_kwargs == {"num_classes": 2, "tokenizer": data.tokenizer, "context": 8}
    tokens, labels = data.train.batch(torch.arange(2))
    end = data.tokenizer.eos
    expected = {1: [end, *"aé".encode(), end], 0: [end, ord("b"), end]}
    for row, label in zip(tokens.tolist(), labels.tolist()):
        assert row[: len(expected[label])] in (expected[label], [end, ord("c"), end])
    assert tokens.shape[1] == max(data.train.lengths)


def test_texts_get_what_bert_expects_around_them(tmp_path, bert):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "good film", "label": 1}, {"text": "a a a a b b", "label": 0}] * 2)
    data = ready(TextClassification(path, context=6, tokenizer=bert, test=0.5))
    every = {tuple(row) for part in (data.train, data.test) for row in part.batch(torch.arange(2))[0].tolist()}
    assert every == {
        (*ids("[CLS]", "good", "film", "[SEP]"), -1, -1),
        tuple(ids("[CLS]", "a", "a", "a", "a", "[SEP]")),
    }
    assert data.truncated == {"train": 2}  # of all training texts, before some are held out


def test_what_tokens_are_is_said_where_none_were_chosen(tmp_path, caplog):
    ready(TextClassification(reviews(tmp_path / "a.jsonl"), context=10, test=10))
    assert "cut to 10 tokens, which are bytes (set tokenizer for others): " in caplog.text


def test_pairs_with_marks_between(tmp_path, bert, caplog):
    rows = [{"q": "good film", "p": "bad play", "label": 0}, {"q": "a", "p": "b b b b b b b", "label": 1}] * 2
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = ready(TextClassification(path, context=8, tokenizer=bert, text=["q", "p"], test=0.5))
    every = {tuple(row) for part in (data.train, data.test) for row in part.batch(torch.arange(2))[0].tolist()}
    assert every == {
        (*ids("[CLS]", "good", "film", "[SEP]", "bad", "play", "[SEP]"), -1),
        tuple(ids("[CLS]", "a", "[SEP]", "b", "b", "b", "b", "[SEP]")),
    }
    assert "text_classification: cut to 8 tokens: 2 of 4 train texts" in caplog.text
    with pytest.raises(UserError, match="context 4 has no room for a text beside the tokenizer's special tokens"):
        ready(TextClassification(path, context=4, tokenizer=bert, text=["q", "p"], test=0.5))


@pytest.mark.parametrize("room", range(2, 12))
def test_pairs_are_cut_at_their_longer_text(room):
    """Against taking away one token at a time from the longer text."""
    for first in range(1, 9):
        for second in range(1, 9):
            sizes = [first, second]
            while sum(sizes) > room:
                sizes[sizes.index(max(sizes))] -= 1
            got = _fitted([list(range(first)), list(range(second))], room)
            assert sum(map(len, got)) == sum(sizes)
            assert abs(len(got[0]) - sizes[0]) <= (first + second > room)  # equal but for who keeps an odd one
            assert got == [list(range(len(got[0]))), list(range(len(got[1])))]


# -- classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "classes", "codes"),
    [
        ([1, 0, 2], {}, ["0", "1", "2"], [1, 0, 2]),
        (["1", "0", "2"], {}, ["0", "1", "2"], [1, 0, 2]),
        ([1, 0, 2], {"classes": ["x", "y", "z"]}, ["x", "y", "z"], [1, 0, 2]),
        (["owl", "cat", "dog"], {}, ["cat", "dog", "owl"], [2, 0, 1]),
        (["owl", "cat", "dog"], {"classes": ["dog", "owl", "cat", "elk"]}, ["dog", "owl", "cat", "elk"], [1, 2, 0]),
        ([5, 3, 4], {"classes": ["3", "4", "5"]}, ["3", "4", "5"], [2, 0, 1]),
        (["007", "x", "9"], {}, ["007", "9", "x"], [0, 2, 1]),
        ([True, False, True], {}, ["False", "True"], [1, 0, 1]),
        ([True, False, True], {"classes": ["ham", "spam"]}, ["ham", "spam"], [1, 0, 1]),
        ([1.0, 0.0, 1.0], {}, ["0", "1"], [1, 0, 1]),
        (["1.0", "0.0", "1.0"], {}, ["0", "1"], [1, 0, 1]),
        ([1, 2, 1], {}, ["1", "2"], [0, 1, 0]),
        (["5", "1", "10"], {}, ["1", "5", "10"], [1, 0, 2]),
        ([5.0, "x", 10], {}, ["10", "5", "x"], [1, 2, 0]),
    ],
)
def test_names_and_numbers_of_classes(tmp_path, values, options, classes, codes):
    rows = [{"text": f"text {i}", "kind": value} for i, value in enumerate(values)]
    rows.append({"text": "held out", "kind": values[0], "split": "test"})
    data = ready(TextClassification(jsonl(tmp_path / "a.jsonl", rows), context=20, label="kind", **options))
    assert data.classes == classes
    assert data.train.labels.tolist() == codes
    assert data.test.labels.tolist() == codes[:1]


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (2.5, {}, r"line 3: 'label' is 2.5, a score: regression is not supported"),
        (-1, {}, "line 3: 'label' is -1, which stands for no class; leave out splits"),
        (None, {}, "line 3: 'label' must be the number or name of a class, got None"),
        (" ", {}, "line 3: 'label' is an empty name"),
        ("2.5", {}, r"line 3: 'label' is 2.5, a score: regression is not supported"),
        (float("nan"), {}, "line 3: 'label' is nan, which stands for no class"),
        (2, {"classes": ["a", "b"]}, "line 3: 'label' is 2, but there are only 2 classes, and numbers count from 0"),
    ],
)
def test_labels_that_are_none(tmp_path, value, options, message):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": v} for v in (0, 0, value)])
    with pytest.raises(UserError, match=message):
        ready(TextClassification(path, context=20, test=1, **options))


@pytest.mark.parametrize("kinds", [("cat", "dog", "owl"), (0, 1, 2), ("1.0", "2.0", "3.0")])
def test_classes_of_the_test_set_must_be_known(tmp_path, kinds):
    """Named or numbered, a class of which there is nothing to learn is no mistake to pass over."""
    rows = [{"text": f"t{i}", "label": kind, "split": "test" if i == 2 else "train"} for i, kind in enumerate(kinds)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"line 3: class .* is none of the classes of the training samples; list all"):
        ready(TextClassification(path, context=20))
    named = ready(TextClassification(path, context=20, classes=[str(kind) for kind in kinds]))
    assert named.num_classes == 3 and named.test.labels.tolist() == [2]


def test_labels_that_are_not_counted_from_0_are_told(tmp_path, caplog):
    caplog.set_level("INFO", "fdl")
    ready(TextClassification(stars(tmp_path, [1, 5] * 10), context=20, test=2))
    assert caplog.messages == ["'label': the numbers 1, 5 are classes 0 … 1 in this order"]
    caplog.clear()
    ready(TextClassification(stars(tmp_path, [0, 1] * 10), context=20, test=2))
    assert caplog.messages == []


@pytest.mark.parametrize("kind", [int, "row {}".format])
def test_identifiers_as_labels_are_told(tmp_path, caplog, kind):
    ready(TextClassification(stars(tmp_path, [kind(i) for i in range(30)]), context=20, test=2))
    assert "'label' has 30 different values in 30 training samples: these look like identifiers" in caplog.text
    caplog.clear()
    ready(TextClassification(stars(tmp_path, [kind(i // 2) for i in range(30)]), context=20, test=2))
    assert "identifiers" not in caplog.text


def test_names_that_differ_in_case_only_are_told(tmp_path, caplog):
    ready(TextClassification(stars(tmp_path, ["neg", "pos", "Pos"] * 4), context=20, test=2))
    assert "'Pos' and 'pos' are two classes, though they differ only in case" in caplog.text


def stars(folder, labels):
    return jsonl(folder / "labels.jsonl", [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)])


def test_texts_that_are_none(tmp_path, bert):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "", "label": 1}, {"text": "b", "label": 1}])
    with pytest.raises(UserError, match="line 2: 'text' is an empty text; set skip_empty: true"):
        ready(TextClassification(path, context=20, test=1))
    assert len(ready(TextClassification(path, context=20, test=1, skip_empty=True)).train) == 1
    with pytest.raises(UserError, match="line 1: no key 'sentence'; there are 'text', 'label'"):
        ready(TextClassification(path, context=20, test=1, text="sentence"))
    with pytest.raises(UserError, match="text must be one key, or two for pairs"):
        TextClassification(path, context=20, text=["a", "b", "c"])
    jsonl(tmp_path / "a.jsonl", [{"text": "\u200b", "label": 0}] * 3)
    with pytest.raises(UserError, match="line 1: the tokenizer makes nothing of the text"):
        ready(TextClassification(path, context=20, test=1, tokenizer=bert))


# -- where it comes from and where it goes -----------------------------------------------------------------------


def test_folders_of_classes(tmp_path):
    for place in ("train/pos/1", "train/pos/2", "train/neg/1", "train/unsup/1", "test/neg/7"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{place}.txt").write_text(f"text of {place}")
    (tmp_path / "train" / "notes.txt").write_text("of no class")
    data = ready(TextClassification(str(tmp_path), context=40, where={"label": ["pos", "neg"]}))
    assert data.classes == ["neg", "pos"]
    assert texts(data, data.train) == ["text of train/neg/1", "text of train/pos/1", "text of train/pos/2"]
    assert data.train.labels.tolist() == [0, 1, 1]
    assert texts(data, data.test) == ["text of test/neg/7"]


def test_folders_of_groups(tmp_path):
    for place in ("clinic_a/ill/1", "clinic_a/well/2", "clinic_b/ill/3", "clinic_b/well/4"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{place}.txt").write_text(f"text of {place}")
    data = ready(TextClassification(str(tmp_path), context=40, group="clinic", test=1))
    assert data.classes == ["ill", "well"]
    parts = data.partition(ByGroup(), 2, 0)
    assert [set(data.groups[part]) for part in parts] in ([{"clinic_a"}, {"clinic_b"}], [{"clinic_b"}, {"clinic_a"}])
    with pytest.raises(UserError, match=r"no texts in .*/class/ \(\.txt"):
        ready(TextClassification(str(tmp_path), context=40, test=1))


def test_hold_outs_are_stratified_and_groups_stay_with_their_texts(tmp_path):
    data = ready(TextClassification(reviews(tmp_path / "a.jsonl"), context=40, group="kind", proxy=20, test=10))
    assert torch.bincount(data.test.labels).tolist() == [5, 5]
    assert data.proxy.labels is None
    assert data.proxy.groups is None
    assert [text.split()[1] for text in texts(data, data.train)] == data.groups.tolist()
    assert [text.split()[1] for text in texts(data, data.test)] == data.test.groups.tolist()
    assert sorted(np.concatenate(data.partition(Dirichlet(1.0, min_samples=1), 3, 0))) == list(range(30))


def test_public_texts_of_another_data_set(tmp_path):
    (tmp_path / "public.txt").write_text("a public text\nanother one")
    public = TextFiles(str(tmp_path / "public.txt"), context=50, document="line")
    data = ready(TextClassification(reviews(tmp_path / "a.jsonl"), context=9, proxy=public, test=10))
    assert sorted(texts(data, data.proxy)) == ["a public ", "another o"]
    assert data.proxy.labels is None


class Words(LightningModule):
    def __init__(self, vocabulary, classes):
        super().__init__()
        self.words, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, classes)

    def forward(self, tokens):
        seen = (tokens >= 0).unsqueeze(-1)
        return self.head((self.words(tokens.clamp(min=0)) * seen).sum(1) / seen.sum(1))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.training_step(batch, _)

    def test_step(self, batch, _):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))

    def predict_step(self, batch, _):
        assert batch[1] is None
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def plain_trainer(epochs):
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_plain_trainer_learns_from_it(tmp_path, bert):
    torch.manual_seed(0)
    path = reviews(tmp_path / "a.jsonl")
    data = TextClassification(path, context=16, tokenizer=bert, proxy=8, validation=6, test=20)
    model, run = Words(len(WORDS), 2), plain_trainer(20)
    run.fit(model, datamodule=data)
    assert run.test(model, datamodule=data, verbose=False)[0]["accuracy"] == 1
    assert torch.cat(run.predict(model, datamodule=data)).shape == (8, 2)


# -- real data ---------------------------------------------------------------------------------------------------

real = pytest.mark.skipif("FDL_DATA" not in os.environ, reason="needs the data sets that FDL_DATA points at")
PAIR = {"text": ["text_a", "text_b"]}


@real
@pytest.mark.parametrize(
    ("file", "options", "counts", "classes"),
    [
        ("sst2", {}, {"train": 67349, "test": 872}, 2),
        ("agnews_10k", {}, {"train": 10001, "test": 7600}, 4),
        ("trec5500", {}, {"train": 4952, "test": 500}, 6),
        ("mrpc", PAIR, {"train": 3667, "validation": 408, "test": 1725}, 2),
        ("rte", PAIR, {"train": 2490, "test": 277}, 2),
        ("cola", {}, {"train": 8551, "test": 1043}, 2),
        ("banking77", {"label": "intent"}, {"train": 10003, "test": 3080}, 77),
        ("clinc150", {"group": "domain"}, {"train": 15100, "validation": 3100, "test": 5500}, 151),
        ("stackoverflow_titles20", {"label": "tag"}, {"train": 16000, "test": 4000}, 20),
        ("imdb_6k3k", {}, {"train": 6000, "test": 3000}, 2),
        (
            "tweeteval_4tasks",
            {"where": {"task": "irony"}, "label": "label_name"},
            {"train": 2862, "validation": 955, "test": 784},
            2,
        ),
    ],
)
def test_published_sets(file, options, counts, classes):
    path = os.path.join(os.environ["FDL_DATA"], f"{file}.jsonl.gz")
    data = ready(TextClassification(path, context=64, **options))
    found = {split: len(getattr(data, split)) for split in counts}
    assert found == counts
    assert data.num_classes == classes == len(data.train.labels.unique())
    assert 1 < data.train.batch(torch.arange(100))[0].shape[1] <= 64
    if "group" in options:
        assert Counter(data.groups.tolist())["banking"] == 15 * 100
        assert len(set(data.groups)) == 11
        assert len(data.partition(ByGroup(), 11, 0)) == 11


@real
def test_scores_are_refused():
    path = os.path.join(os.environ["FDL_DATA"], "stsb.jsonl.gz")
    with pytest.raises(UserError, match=r"line 2: 'score' is 3.8, a score: regression is not supported"):
        ready(TextClassification(path, context=64, label="score", **PAIR))


@real
def test_cola_in_bert_s_word_pieces():
    folder = os.environ["FDL_DATA"]
    vocabulary = os.path.join(folder, "tokenizers", "bert_base_uncased_vocab.txt.gz")
    data = ready(TextClassification(os.path.join(folder, "cola.jsonl.gz"), 64, tokenizer=vocabulary, limit=500))
    assert len(data.train) == 500
    tokens, _ = data.test.batch(torch.arange(1043))
    assert (tokens[:, 0] == 101).all()
    ends = tokens.gather(1, data.test.lengths[:, None] - 1)
    assert (ends == 102).all()
    assert data.tokenizer.fingerprint == make_tokenizer(vocabulary).fingerprint
