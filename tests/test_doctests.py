"""The examples in docstrings give what they claim to give."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fdl"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
LEAST = 60
"""How many functions and classes show how they are used, at least."""


def examples(name: str) -> list[doctest.DocTest]:
    """The docstrings of a module that have examples."""
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    runner = doctest.DocTestRunner()
    for test in examples(name):
        runner.run(test)
    assert runner.tries and not runner.failures, f"{runner.failures} of {runner.tries} lines, see the output above"


def test_there_are_enough_of_them():
    assert sum(len(examples(name)) for name in MODULES) >= LEAST
