"""docs/methods.md names every method, and nothing that is not there."""

import re
from pathlib import Path

import pytest

from fdl.recipe import load
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
TRAVELS, _, CHECKED = PAGE.partition("### Checked against the papers")
ROWS = [line for line in TRAVELS.splitlines() if line.startswith("| `")]
CHECKED = [line for line in CHECKED.partition("\n#")[0].splitlines() if line.startswith("| `")]


def test_every_method_has_a_row_and_every_row_a_method():
    named = {name for row in ROWS for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(short_names(KINDS["method"]))


def test_every_method_that_is_not_a_reference_was_checked_against_its_paper():
    named = {re.findall(r"`(\w+)`", row)[0] for row in CHECKED}
    # its presets are named by their papers; the first two have none
    assert named == set(short_names(KINDS["method"])) - {"centralized", "single_site", "federated_distillation"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_row_s_recipe_is_one_of_its_method(row):
    (method, *_), recipes = re.findall(r"`(\w+)`", row.split("|")[1]), re.findall(r"`([\w/]+\.yaml)`", row)
    assert recipes, "no recipe"
    for name in recipes:
        assert load(ROOT / "recipes" / name).method.target == method


def test_every_file_that_it_names_is_there():
    named = {path for path in re.findall(r"[\w./]+\.(?:yaml|py|md)", PAGE) if not path.startswith("http")}
    missing = [p for p in named if not any((ROOT / place / p).is_file() for place in ("", "recipes", "docs", "fdl"))]
    assert not missing and len(named) > 20
