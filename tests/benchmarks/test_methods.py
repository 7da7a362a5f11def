"""benchmarks/methods.py on its smallest job: the table is that of the runs, and unequal work is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fdl.recipe import load
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names
from tests.benchmarks.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return load_script("methods")


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    place = tmp_path_factory.mktemp("methods")
    assert script.main(["--quick", "--seeds", "0", "--only", "single_site", "one_shot", "--output", str(place)]) == 0
    return place


def test_the_table_says_what_the_runs_say(folder):
    with open(folder / "methods.csv", encoding="utf-8", newline="") as file:
        table = {line["method"]: line for line in csv.DictReader(file)}
    summaries = {m: json.loads((folder / m / "seed-0" / "summary.json").read_text()) for m in table}
    assert list(table) == ["centralized", "single_site", "one_shot"]
    # of the last round; the best is beside it
    central = summaries["centralized"]["metrics"]["student/test/accuracy"]
    expected = {
        "centralized": central,
        "single_site": summaries["single_site"]["metrics"]["specialists/test/accuracy"],
        "one_shot": summaries["one_shot"]["metrics"]["student/test/accuracy"],
    }
    for method, line in table.items():
        assert float(line["accuracy"]) == expected[method]
        assert float(line["kte"]) == pytest.approx(expected[method] / central)
        sent = summaries[method]["communication"]
        assert float(line["setup_bytes"]) == sent["setup_bytes"]
        assert float(line["bytes"]) == sent["upload_bytes"] + sent["download_bytes"]
        assert float(line["peak_bytes"]) == summaries[method]["memory"]["peak_rss_bytes"] > 1e8
        best = summaries[method]["best"]["metrics"].get("student/test/accuracy")
        assert line["accuracy_best"] == ("" if best is None else str(best))
    assert table["single_site"]["answers"] == "clients" and float(table["single_site"]["bytes"]) == 0
    # one round, three clients, answers of ten classes to 400 samples: 4 bits each, entropy coded, two scales and a
    # byte of confidence a sample; 41 bytes without a code
    assert 3 * 400 < float(table["one_shot"]["bytes"]) < 3 * 400 * (5 + 8 + 1)
    assert table["one_shot"]["rounds"] == "1" and ", single round" in (folder / "methods.md").read_text("utf-8")


def test_the_target_is_reached_in_one_window_for_all(script):
    from fdl.metrics.federation import rounds_to_target

    # the first round whose own accuracy is enough, whether there are more rounds or not
    assert rounds_to_target({1: 0.95}, 0.9, script.WINDOW) == 1
    assert rounds_to_target({1: 0.95, 2: 0.1, 3: 0.1}, 0.9, script.WINDOW) == 1
    assert rounds_to_target({1: 0.8, 2: 0.95, 3: 0.8}, 0.9, script.WINDOW) == 2


def test_a_method_of_one_round_takes_all_steps_in_it(script, tmp_path):
    planned = script.plan(script.RECIPE, script.QUICK, ["fedavg", "one_shot"], [0], tmp_path)
    average, single = map(script.at_once, planned)
    assert (average.recipe.federation.rounds, average.recipe.local_training.steps) == (3, 10)
    assert (single.recipe.federation.rounds, single.recipe.local_training.steps, single.recipe.server_distil.steps) == (
        1,
        30,
        60,
    )
    script.assert_equal_work([average, single])
    with pytest.raises(AssertionError, match="one_shot takes 10 local_training steps, others 30"):
        script.assert_equal_work([average, planned[1]._replace(recipe=_once(planned[1].recipe))])
    longer = replace(average.recipe, local_training=replace(average.recipe.local_training, batch_size=16))
    with pytest.raises(AssertionError, match=r"fedavg differs in \['local_training.batch_size'\]"):
        script.assert_equal_work([average, average._replace(recipe=longer)])


def _once(recipe):
    return replace(recipe, federation=replace(recipe.federation, rounds=1))


def test_files_for_people(folder):
    text = (folder / "methods.md").read_text(encoding="utf-8")
    assert text.startswith("digits, 3 clients, 3 rounds.") and "| one_shot | student |" in text
    assert (folder / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert any((folder / "tensorboard/summary").iterdir()) and (folder / "tensorboard/one_shot-seed0").is_dir()


@pytest.mark.slow
def test_the_photographs_take_the_same_variants(script, tmp_path):
    changes = script.overrides("cifar10", tmp_path / "images.npz", quick=False)
    recipe = load(script.RECIPE, changes)
    assert recipe.data.args["public"] == 500 and recipe.data.args["size"] == 16
    for mode in ("merged", "periodic"):
        sizes = recipe.compare.variants[f"codistillation_{mode}"]["specialists"]
        assert sizes[0]["args"] == recipe.student.args
    (run,) = script.plan(script.RECIPE, changes, ["codistillation_merged"], [0], tmp_path)
    assert [one.args["channels"] for one in run.recipe.specialists] == [[16, 32, 32], [32, 64, 64]]


def test_every_method_for_labelled_images_is_compared(script):
    recipe = load(script.RECIPE)
    methods = [changes["method"] for changes in recipe.compare.variants.values()]
    named = {method if isinstance(method, str) else method["target"] for method in methods}
    elsewhere = {"affinity_distillation", "cfed", "federated_prompts", "fedlora", "pfedpg", "token_distillation"}
    assert named == set(short_names(KINDS["method"])) - elsewhere


def test_every_method_has_the_same_budget_of_trials(monkeypatch, tmp_path):
    tune = load_script("tune")
    trials = tune.space()
    variants = load(ROOT / "benchmarks/methods.yaml").compare.variants
    assert {len(settings) for settings in trials.values()} == {6} and all(s[0] == [] for s in trials.values())
    # what has no setting of its own, what repeats another row, and what has no student
    rest = {"centralized", "single_site", "fedavg", "fedavg_coded", "feddf_last", "fedproto", "fedgkt"}
    assert set(trials) == set(variants) - rest
    # every override names something that is there, and changes it
    for run, number, _ in tune.planned({"feddf": trials["feddf"], "cfd": trials["cfd"]}, [], 10, tmp_path):
        assert run.recipe.seed == 10 and run.folder == tmp_path / run.variant / f"trial-{number}"
    with pytest.raises(SystemExit, match="the tables report it"):
        tune.main(["--seed", "1"])
    with pytest.raises(SystemExit, match="no trials for fedavg"):
        tune.space(["fedavg"])


def test_the_best_trial_is_the_one_that_does_best_on_validation_data(monkeypatch, tmp_path):
    tune = load_script("tune")
    found = {0: (0.8, 0.5), 1: (0.9, 0.7), 2: (0.9, 0.6), 3: (0.9, 0.6)}
    monkeypatch.setattr(
        tune, "score", lambda folder: dict(zip(("accuracy", "nll"), found[int(folder.name[-1])], strict=True))
    )
    run = lambda n: tune.PlannedRun("ds_fl", 10, None, tmp_path / f"trial-{n}")  # noqa: E731
    table = tune.tabulate([(run(n), n, []) for n in found])
    assert [line["best"] for line in table] == [False, False, True, False]
    assert sum("| yes |" in line for line in tune.markdown(table, 10)) == 1
