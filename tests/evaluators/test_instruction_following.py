"""Instruction following with canned answers, and with a model that recites."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fdl.datamodules.text import TextSamples
from fdl.errors import UserError
from fdl.evaluators.instruction_following import InstructionFollowing, score_responses
from fdl.modules.tokenizers import ByteTokenizer
from tests.evaluators.models import Bigram
from tests.evaluators.worlds import server

LINES = [
    {"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "prompt": "Two words in quotes.",
        "instruction_id_list": ["length_constraints:number_words", "startend:quotation"],
        "kwargs": [{"relation": "less than", "num_words": 3, "keyword": None}, {"relation": None}],
    },
    {"prompt": "End so.", "instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": "x y"}]},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in LINES)
    return str(path)


def world():
    samples = TextSamples(np.arange(4, dtype=np.int32), [4])
    return server(samples, task="language", model_kwargs={"tokenizer": ByteTokenizer(), "context": 64})


def test_scores_of_canned_answers(prompts):
    read = InstructionFollowing(prompts)._read()
    assert [len(prompt.instructions) for prompt in read] == [1, 2, 1]
    got = score_responses(read, ["Sure, yes:\nno", '"one two"', "*x* y"])
    assert got == {
        "prompt_strict": pytest.approx(1 / 3),
        "instruction_strict": pytest.approx(2 / 4),
        "prompt_loose": 1.0,
        "instruction_loose": 1.0,
        "strict_end_checker": 0.0,
        "strict_no_comma": 0.0,
        "strict_number_words": 1.0,
        "strict_quotation": 1.0,
    }
    half = score_responses(read, ["fine", '"one two three"', ""])
    assert (half["prompt_strict"], half["instruction_strict"]) == (pytest.approx(1 / 3), 0.5)


def test_a_model_is_asked_in_the_template_and_its_answers_checked(prompts):
    """After "\\n" comes "x", then " ", "y" and the end of text."""
    table = torch.zeros(257, 257)
    for first, second in zip("\nx y", ["x", " ", "y", None]):
        table[ord(first), 256 if second is None else ord(second)] = 9
    module, asked = Bigram(table), world()
    got = InstructionFollowing(prompts, new_tokens=10, template="{}\n").evaluate(asked, module)
    assert (got["prompt_strict"], got["instruction_strict"]) == (pytest.approx(2 / 3), 0.75)
    assert got["strict_quotation"] == 0
    other = InstructionFollowing(prompts, new_tokens=10, template="{} ").evaluate(asked, module)
    assert other["strict_end_checker"] == 0  # it only says "y" now
    assert "strict_quotation" not in InstructionFollowing(prompts, limit=1, new_tokens=3).evaluate(asked, module)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "unknown instruction 'punctuation:no_coma'; did you mean"),
        ({"kwargs": []}, "must be lists of one length"),
        (
            {"kwargs": [{"num_words": 3}]},
            "line 2: punctuation:no_comma: got an unexpected keyword argument 'num_words'",
        ),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]},
            "line 2: language:response_language: language must be one of",
        ),
        (
            {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": 3}]},
            "line 2: startend:end_checker",
        ),
        ({"prompt": ""}, "line 2: 'prompt' is an empty text"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (LINES[0], LINES[0] | change)))
    with pytest.raises(UserError, match=message):
        InstructionFollowing(str(path)).prepare(world())


def test_bad_arguments(prompts):
    with pytest.raises(UserError, match="no such file"):
        InstructionFollowing("nowhere.jsonl").prepare(world())
    with pytest.raises(UserError, match=r"template must have {}"):
        InstructionFollowing(prompts, template="Do it.")
    with pytest.raises(UserError, match="limit must be at least 1"):
        InstructionFollowing(prompts, limit=0)


@pytest.mark.skipif("FDL_DATA" not in os.environ, reason="FDL_DATA names no folder with ifeval_541.jsonl.gz")
def test_the_541_prompts_of_ifeval():
    read = InstructionFollowing(str(Path(os.environ["FDL_DATA"]) / "ifeval_541.jsonl.gz"))._read()
    assert len(read) == 541
    assert sum(len(prompt.instructions) for prompt in read) == 834
    assert len({rule for prompt in read for rule, _ in prompt.instructions}) == 25
    empty, canned = (score_responses(read, [answer] * 541) for answer in ("", "I do not know."))
    assert set(empty.values()) == {0.0}
    assert len(canned) == 4 + 25
    # what a short answer without commas, capitals or format gets right, and what it cannot
    assert canned["strict_no_comma"] == canned["strict_forbidden_words"] == 1
    assert canned["strict_json_format"] == canned["strict_title"] == canned["strict_two_responses"] == 0
    assert 0.1 < canned["instruction_strict"] < 0.3
    repeated = score_responses(read, [prompt.text for prompt in read])
    assert repeated["prompt_strict"] <= repeated["prompt_loose"] <= 1
    assert repeated["instruction_strict"] <= repeated["instruction_loose"]
