"""What ``import fdl`` offers, and what its functions return."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from lightning import LightningModule

import fdl
from fdl.errors import RecipeError, UserError

ROOT = Path(__file__).parents[1]
RECIPE = {
    "name": "small",
    "method": "fedavg",
    "data": {"target": "digits", "args": {"proxy": 0, "validation": 50, "test": 100, "limit": 400}},
    "federation": {"clients": 2, "rounds": 2},
    "student": {"target": "mlp", "args": {"hidden": [8]}},
    "local_training": {"steps": 5},
    "callbacks": ["csv"],
    "fabric": {"accelerator": "cpu", "threads": 1},
}


def test_importing_loads_nothing_heavy():
    """Neither the package nor reading a recipe loads torch, and the errors for people need none of it either."""
    code = (
        "import sys, fdl; heavy = {'torch', 'numpy', 'omegaconf'} & set(sys.modules); assert not heavy, heavy\n"
        "from fdl import load_recipe, fit, compare, build, UserError; load_recipe('recipes/quickstart.yaml')\n"
        "heavy = {'torch', 'lightning'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})


def test_every_name_is_there_and_has_a_docstring():
    for name in fdl.__all__:
        thing = getattr(fdl, name)
        assert callable(thing) and thing.__doc__, name
    assert set(fdl.__all__) <= set(dir(fdl)) and fdl.__all__ == sorted(fdl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        fdl.fitt  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "fdl" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == fdl.__all__
    for name, module in seen.items():
        assert name == "build" or getattr(fdl, name) is getattr(sys.modules[module], name)


def test_fit_returns_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fdl.fit(RECIPE, ["federation.rounds=1"], str(tmp_path / "run"))
    assert run.folder == tmp_path / "run" and run.recipe.federation.rounds == 1
    assert run.summary == json.loads((run.folder / "summary.json").read_text())
    (row,) = run.history
    assert row["round"] == 1 and all(isinstance(value, int | float | str) for value in row.values())
    assert row["student/test/accuracy"] == run.metrics["student/test/accuracy"]
    assert isinstance(run.student, LightningModule) and not run.student.training and run.student is run.student
    assert run.load_student("best") is not run.student
    accuracy = run.metrics["student/test/accuracy"]
    assert repr(run).startswith(f"Run({str(run.folder)!r}: fedavg, 1 round, student/test/accuracy {accuracy:.4g}, ")
    more = fdl.fit(RECIPE, output_dir=run.folder, resume=True)
    assert [row["round"] for row in more.history] == [1, 2]
    again = fdl.Run(str(run.folder))
    assert again.summary == more.summary and again.recipe == more.recipe
    loop = fdl.build(fdl.load_recipe(run.folder / "recipe.yaml"), str(tmp_path / "other"))
    assert isinstance(loop, fdl.FederatedLoop) and loop.folder == tmp_path / "other"


def test_compare_returns_the_table(tmp_path):
    (tmp_path / "small.yaml").write_text(json.dumps({**RECIPE, "output_dir": str(tmp_path / "runs")}))
    changes = ["federation.rounds=1"]
    found = fdl.compare(str(tmp_path / "small.yaml"), changes, methods=["fedavg", "fedprox"], seeds=[0])
    assert [row["variant"] for row in found.table] == ["fedavg", "fedprox"]
    assert [run.summary["method"] for run in found.runs] == ["fedavg", "fedprox"]
    assert found.folder == tmp_path / "runs" / "small" / "compare" and (found.folder / "compare.md").is_file()
    assert "2 runs of fedavg, fedprox" in repr(found)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fdl.fit("nowhere.yaml"), "no such recipe file"),
        (lambda: fdl.fit(RECIPE, "seed=1"), r"expected a list of key=value strings, got a string; write \['seed=1'\]"),
        (lambda: fdl.fit(3), "expected a path, a mapping or a Recipe, got int"),
        (lambda: fdl.compare([]), "expected at least one recipe file"),
        (lambda: fdl.compare("a.yaml", methods="fedavg"), r"methods: expected a list of strings.*\['fedavg'\]"),
        (lambda: fdl.Run("."), "holds no finished run"),
    ],
)
def test_a_mistake_is_a_user_error(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call()


def test_a_wrong_recipe_is_a_recipe_error():
    with pytest.raises(RecipeError, match="did you mean 'federation'"):
        fdl.load_recipe({**RECIPE, "federatoin": {}})
