"""Small encoders on SST-2 and AG News: alone, and in a federation."""

import pytest

from tests.real.data import FOLDER, adam, federation, real

pytestmark = real

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
BERT = {"target": "text_classifier", "args": {"model": "bert", "config": TINY, "pooling": "mean"}}
SMALLER = {"target": "text_classifier", "args": {"model": "bert", "config": {**TINY, "num_hidden_layers": 1}}}
SMALLER["args"]["pooling"] = "mean"


def texts(name: str, limit: int, context: int = 24, **options) -> dict:
    vocabulary = str(FOLDER / "tokenizers/bert_base_uncased_vocab.txt.gz")
    args = {"path": str(FOLDER / f"{name}.jsonl.gz"), "tokenizer": vocabulary, "context": context, "limit": limit}
    return {"target": "text_classification", "args": {**args, **options}}


def accuracy(folder, name, limit, steps):
    loop = federation(
        folder,
        method="centralized",
        data=texts(name, limit),
        federation={"clients": 2},
        student=BERT,
        local_training=adam(steps),
        evaluation={"batch_size": 256},
    )
    loop.run()
    return loop.history[-1]["metrics"]["student/test/accuracy"]


@pytest.mark.parametrize(("name", "floor"), [pytest.param("agnews_10k", 0.65, marks=pytest.mark.slow), ("sst2", 0.58)])
def test_a_tiny_bert_learns_from_scratch_in_seconds(tmp_path, name, floor):
    """Chance is 0.25 for AG News, and 0.51 for SST-2."""
    assert accuracy(tmp_path, name, 4000, 90) > floor


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit", "floor"), [("agnews_10k", 10_000, 0.76), ("sst2", 60_000, 0.73)])
def test_a_tiny_bert_learns_from_scratch(tmp_path, name, limit, floor):
    """Seen were 0.80 and 0.77."""
    assert accuracy(tmp_path, name, limit, 1200) > floor


def federated(folder, name, limit, rounds, steps):
    loop = federation(
        folder,
        method={"target": "federated_distillation", "args": {"confidence": "entropy"}},
        data=texts(name, limit, proxy=0.25),
        partition={"target": "dirichlet", "args": {"alpha": 1.0}},
        federation={"clients": 3, "rounds": rounds},
        specialists=[BERT, SMALLER],
        student=SMALLER,
        local_training=adam(steps),
        client_distil=adam(steps // 4),
        server_distil=adam(steps),
        evaluation={"batch_size": 256, "metrics": ["accuracy"]},
    )
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    assert loop.ledger.totals()["upload_bytes"] > 0
    return [record["metrics"]["student/test/accuracy"] for record in loop.history]


def test_a_student_of_text_specialists_beats_chance_after_a_round(tmp_path):
    """The most frequent of TREC's six kinds of question is 0.22 of them."""
    assert federated(tmp_path, "trec5500", 4000, 1, 60)[-1] > 0.45


@pytest.mark.slow
def test_a_student_of_text_specialists_grows_better(tmp_path):
    first, last = federated(tmp_path, "agnews_10k", 10_000, 2, 300)
    assert 0.65 < first < last
