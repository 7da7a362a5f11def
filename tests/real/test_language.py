"""Tiny Shakespeare by role: every client plays a few roles, and the student is taught what they all say."""

import math

import pytest

from tests.real.data import FOLDER, adam, federation, real

pytestmark = real

PUBLIC = ["First Citizen", "MENENIUS", "QUEEN MARGARET", "KING RICHARD III"]
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 48, "intermediate_size": 96}
MODEL = {"target": "causal_lm", "args": {"model": "llama", "config": LLAMA}}


def shakespeare(folder, steps, rounds=1, specialists=(MODEL,), ground_truth=0.5):
    path = str(FOLDER / "tinyshakespeare_by_role.jsonl.gz")
    roles = {"text": "speeches", "group": "role", "proxy_groups": PUBLIC, "test": 0.03}
    args = {"confidence": "bayesian_mixture", "mass": 0.95, "proxy_fraction": 0.3, "ground_truth": ground_truth}
    loop = federation(
        folder,
        method={"target": "token_distillation", "args": args},
        data={"target": "text_table", "args": {"path": path, "context": 48, **roles}},
        partition="by_group",
        federation={"clients": 3, "rounds": rounds, "calibration_fraction": 0},
        specialists=list(specialists),
        student=MODEL,
        local_training=adam(steps, 8, 0.005),
        client_distil=adam(steps // 4, 8, 0.005),
        server_distil=adam(steps, 8, 0.005),
        evaluation={"batch_size": 256, "metrics": ["nll", "bits_per_byte"]},
    )
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    return loop, [record["metrics"]["student/test/nll"] for record in loop.history]


def test_a_round_teaches_a_student_english_letters(tmp_path):
    """An untrained model has ln 257 = 5.5 nats a byte, one that knows how frequent letters are has 3.3."""
    loop, (nll,) = shakespeare(tmp_path, 80)
    assert nll < 2.8
    bits = loop.history[0]["metrics"]["student/test/bits_per_byte"]
    assert bits == pytest.approx(nll / math.log(2), rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)  # logits over GPT-2's whole vocabulary, on one core
def test_the_next_round_teaches_more_also_with_a_specialist_of_words(tmp_path):
    """One of the clients has GPT-2's tokenizer; nobody tells the student what the public text says."""
    vocabulary = str(FOLDER / "tokenizers/gpt2_encoder.json.gz")
    of_words = {"target": "aligned_causal_lm", "args": {**MODEL["args"], "own_tokenizer": vocabulary}}
    _, (first, second) = shakespeare(tmp_path, 200, 2, [MODEL, of_words, MODEL], ground_truth=0.0)
    assert second < first < 2.7
