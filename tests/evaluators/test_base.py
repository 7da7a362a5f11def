"""Evaluators as recipes name them."""

import pytest

from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.evaluators.linear_probe import LinearProbe
from fdl.evaluators.zero_shot import ZeroShot
from fdl.metrics.tasks import TASKS
from fdl.registry.instantiate import instantiate
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import entries


def test_all_are_found_by_name_and_say_what_they_are_for():
    found = entries(KINDS["evaluator"])
    assert [entry.name for entry in found] == [
        "backdoor",
        "base_new",
        "continual",
        "generation",
        "instruction_following",
        "linear_probe",
        "retrieval",
        "zero_shot",
    ]
    for entry in found:
        module, _, name = entry.path.rpartition(".")
        cls = getattr(__import__(module, fromlist=[name]), name)
        assert issubclass(cls, Evaluator)
        assert cls.name == entry.name and entry.summary.endswith(".")
        assert cls.tasks and set(cls.tasks) <= set(TASKS)


def test_a_recipe_s_arguments_reach_them():
    probe = instantiate({"target": "linear_probe", "args": {"shots": [4, 1], "every": 5}}, "evaluator", "probes.0")
    assert isinstance(probe, LinearProbe)
    assert (probe.shots, probe.every, probe.data) == ([1, 4], 5, None)
    data = {"target": "digits", "args": {"validation": 100}}
    probe = instantiate({"target": "zero_shot", "args": {"data": data}}, "evaluator", "probes.1")
    assert isinstance(probe, ZeroShot) and probe.data.name == "digits"


def test_one_runs_after_the_last_round_only_unless_told_otherwise():
    assert ZeroShot().every == 0
    with pytest.raises(UserError, match="every must be at least 0, got -1"):
        ZeroShot(every=-1)


def test_one_question_can_be_asked_in_two_ways_under_two_labels():
    assert (ZeroShot().label, ZeroShot(label="unseen").label) == ("zero_shot", "unseen")
    with pytest.raises(UserError, match="label must be a word or two without a slash, got 'a/b'"):
        ZeroShot(label="a/b")
