"""Names of hospitals, from the data to what people look at."""

import json

import numpy as np
import pytest

from fdl.__main__ import main

RECIPE = """
name: sites
method: fedavg
data: {target: arrays, args: {path: PATH, groups: site, validation: 6}}
partition: by_group
federation: {clients: 2, rounds: 1}
student: {target: mlp, args: {hidden: [4]}}
local_training: {steps: 1}
evaluation: {metrics: [accuracy]}
fabric: {accelerator: cpu, threads: 1}
callbacks: [tensorboard]
"""


@pytest.fixture
def recipe(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 4, 4), dtype=np.uint8), np.arange(60) % 3
    site = np.where(np.arange(60) < 20, "St $ohn's", np.where(np.arange(60) < 40, "Charité", "東京"))
    names = np.array(["$5 to $10", "50%_a/b", "日本"])
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9], site=site, classes=names)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("PATH", str(tmp_path / "data.npz")), encoding="utf-8")
    return str(tmp_path / "recipe.yaml")


def test_check_says_who_each_client_is(recipe, capsys):
    assert main(["check", "--recipe", recipe, "federation.clients=3"]) == 0
    said = capsys.readouterr()
    for client in ("0  Charité ", "1  St $ohn's ", "2  東京 "):
        assert any(line.startswith(client) for line in said.out.splitlines())
    assert "groups are" not in said.out + said.err


def test_groups_that_are_put_together_are_said(recipe, tmp_path, capsys, monkeypatch):
    from fdl.utils import figures

    drawn = {}
    histogram = figures.label_histogram
    monkeypatch.setattr(figures, "label_histogram", lambda c, k, n: drawn.update(names=n) or histogram(c, k, n))
    assert main(["fit", "--recipe", recipe, "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    said = " ".join((said.out + said.err).split())
    assert "by_group: 3 groups are put together to make 2 clients" in said
    assert "left out" not in said
    participants = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["participants"]
    assert [p["name"] for p in participants] == drawn["names"]
    assert sorted(" + ".join(drawn["names"]).split(" + ")) == ["Charité", "St $ohn's", "東京"]


def test_clients_that_are_only_numbers_have_no_name(recipe, tmp_path, capsys):
    assert main(["fit", "--recipe", recipe, "--output-dir", str(tmp_path / "run"), "partition=iid"]) == 0
    participants = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["participants"]
    assert all("name" not in p for p in participants)
    assert "groups are" not in capsys.readouterr().err
