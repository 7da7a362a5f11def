"""benchmarks/communication.py on its smallest job: the table is that of the runs, and the files are what it says."""

import csv
import json
from dataclasses import replace

import pytest

from tests.benchmarks.scripts import load_script

WEIGHTS = ["fedavg", "fedavg_coded", "fedprox", "feddf"]
ANSWERS = ["ds_fl_like", "ds_fl_like_subsampled", "cfd_like", "confidence_weighted", "confidence_weighted_labels"]
METHODS = [*WEIGHTS, *ANSWERS]


@pytest.fixture(scope="module")
def script():
    return load_script("communication")


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    place = tmp_path_factory.mktemp("communication")
    assert script.main(["--quick", "--data", "digits", "--seeds", "0", "--output", str(place)]) == 0
    return place


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summary(folder, method):
    return json.loads((folder / method / "seed-0" / "summary.json").read_text())


def test_the_table_says_what_the_runs_say(folder):
    table = rows(folder / "communication.csv")
    assert [line["method"] for line in table] == METHODS
    coded = summary(folder, "fedavg_coded")
    parts = ("upload", "download", "setup", "student_delivery")
    base = sum(summary(folder, "fedavg")["communication"][f"{way}_bytes"] for way in parts[:2])
    whole = sum(coded["communication"][f"{part}_bytes"] for part in parts)
    for line in table:
        found = summary(folder, line["method"])
        sent = found["communication"]
        # after the last round; the best is beside it
        assert float(line["accuracy"]) == found["metrics"]["student/test/accuracy"]
        assert float(line["accuracy_best"]) == found["best"]["metrics"]["student/test/accuracy"]
        assert float(line["best_round"]) == found["best"]["round"]
        assert int(line["upload_bytes"]) == sent["upload_bytes"]
        assert int(line["download_bytes"]) == sent["download_bytes"]
        assert int(line["bytes_together"]) == sum(sent[f"{part}_bytes"] for part in parts)
        assert float(line["percent_of_fedavg"]) == pytest.approx(100 * int(line["bytes"]) / base)
        assert float(line["percent_of_fedavg_coded_together"]) == pytest.approx(
            100 * int(line["bytes_together"]) / whole
        )
        if line["method"] != "fedavg_coded":
            expected = float(line["accuracy"]) - coded["metrics"]["student/test/accuracy"]
            assert float(line["difference"]) == pytest.approx(expected)
        assert int(line["digest_steps"]) == (5 if line["method"] in ANSWERS else 0)


def test_bytes_of_fedavg_are_those_of_its_weights(folder):
    weights = 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10)
    line = rows(folder / "communication.csv")[0]
    # 3 clients, 3 rounds, both ways; a message's names and shapes are on top
    assert int(line["bytes"]) == pytest.approx(2 * 3 * 3 * weights, rel=0.01)
    cheap = {line["method"]: int(line["bytes"]) for line in rows(folder / "communication.csv")}
    order = ["cfd_like", "ds_fl_like_subsampled", "confidence_weighted", "fedavg_coded", "fedavg"]
    assert sorted(order, key=cheap.__getitem__) == order
    assert cheap["fedavg_coded"] < cheap["fedavg"] / 4 and cheap["ds_fl_like"] < cheap["fedavg_coded"]


def test_points_are_the_rounds_with_the_student_of_the_best_so_far(folder):
    found = rows(folder / "points.csv")
    assert len(found) == len(METHODS) * 3
    for method in METHODS:
        mine = [point for point in found if point["method"] == method]
        history = {record["round"]: record for record in summary(folder, method)["history"] if record["round"]}
        for end in (1, 2, 3):
            metrics = [history[round]["metrics"] for round in range(1, end + 1)]
            best = max(metrics, key=lambda m: (m["student/validation/accuracy"], -m["student/validation/nll"]))
            assert float(mine[end - 1]["best"]) == best["student/test/accuracy"]
            assert float(mine[end - 1]["accuracy"]) == metrics[-1]["student/test/accuracy"]
        assert float(mine[-1]["best"]) == summary(folder, method)["best"]["metrics"]["student/test/accuracy"]


def test_the_figure_and_the_curves_are_files_and_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events(path):
        found = EventAccumulator(str(path), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
        found.Reload()
        return found

    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    together = events(folder / "tensorboard/summary")
    assert together.Tags()["images"] == ["communication/pareto"]
    assert together.Images("communication/pareto")[0].encoded_image_string.startswith(b"\x89PNG")
    for method in METHODS:
        run = events(folder / "tensorboard" / f"{method}-seed0")
        assert [event.step for event in run.Scalars("student/test/accuracy")][-1] == 3
        last = run.Scalars("communication/upload_bytes")[-1].value
        assert last == pytest.approx(summary(folder, method)["communication"]["upload_bytes"], rel=1e-6)
        # after the mark for hyperparameters, the run's own
        content = run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert f"{method}".encode() in content


def test_markdown_has_both_tables(folder):
    text = (folder / "communication.md").read_text(encoding="utf-8")
    assert text.startswith("digits, 3 clients, 3 rounds.") and all(f"| {method} |" in text for method in METHODS)
    assert "| quantize/8/row → range |" in text and "MB/s" in text


def test_the_front_holds_what_nobody_beats(script):
    points = {"a": (1, 0.5), "dearer and worse": (2, 0.4), "b": (2, 0.7), "as good but dearer": (3, 0.7), "c": (9, 0.9)}
    table = [{"method": name, "bytes": size, "accuracy": score} for name, (size, score) in points.items()]
    assert script.front(table) == ["a", "b", "c"]


def test_unequal_work_is_refused(script, tmp_path):
    (run,) = script.plan(script.RECIPE, script.QUICK, ["cfd_like"], [0], tmp_path)
    longer = replace(run.recipe, local_training=replace(run.recipe.local_training, steps=11))
    other = replace(run.recipe, data=replace(run.recipe.data, args={**run.recipe.data.args, "proxy": 401}))
    script.assert_equal_work([run, run])
    for recipe, key in ((longer, "local_training.steps"), (other, "data.args.proxy")):
        with pytest.raises(AssertionError, match=rf"cfd_like and cfd_like differ in \['{key}'\]"):
            script.assert_equal_work([run, run._replace(recipe=recipe)])
