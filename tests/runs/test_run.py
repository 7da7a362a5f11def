"""Whole runs, as people start them: real data, real loop, real files."""

import contextlib
import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fdl.__main__ import main
from tests.callbacks.test_tensorboard import curves, hparams, read

RECIPE = """\
name: small
method: {target: federated_distillation, args: {confidence: {target: density, args: {k: 3}}}}
data: {target: digits, args: {proxy: 100, validation: 100, test: 200}}
partition: {target: dirichlet, args: {alpha: 0.3}}
federation: {clients: 4, rounds: 5, client_fraction: 0.75, dropout: 0.2}
specialists: [{target: mlp, args: {hidden: [32]}}, {target: mlp, args: {hidden: [16, 16]}}]
student: {target: mlp, args: {hidden: [32]}}
local_training: {steps: 60, optimizer: {target: adam, args: {lr: 0.002}}}
server_distil: {steps: 150, optimizer: {target: adam, args: {lr: 0.002}}}
channel: {upload: [{target: quantize, args: {bits: 8}}, {target: deflate}]}
evaluation: {metrics: [accuracy, nll]}
fabric: {accelerator: cpu, threads: 1}
compare:
  seeds: [0, 1]
  reference: centralized
  variants:
    ours: {}
    centralized: {method: centralized}
"""

QUICK = ["federation.rounds=2", "local_training.steps=10", "server_distil.steps=10"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "fdl", *map(str, arguments)]


def start(*arguments) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_round(process: subprocess.Popen, folder: Path, round: int) -> None:
    """Until the checkpoint of a round lies there."""
    deadline = time.monotonic() + 120
    while not any((folder / "checkpoints").glob(f"round-{round:06d}-*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def here(capsys, *arguments) -> tuple[int, str, str]:
    """Run in this process, which spares the imports."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def outcome(folder: Path) -> dict:
    """All that must not depend on whether the run was interrupted."""
    found = summary(folder)
    for key in ("time", "memory", "environment"):
        del found[key]
    for one in found["history"]:
        del one["seconds"]
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in csv.DictReader(file)]
    return {"summary": found, "rows": rows}


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    """A run without interruption: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["fit", "--recipe", str(recipe), "--output-dir", str(folder)]) == 0
    return folder, out.getvalue()


# --- what a run leaves


def test_a_run_ends_with_a_table_and_leaves_its_files(straight):
    folder, out = straight
    found = summary(folder)
    keys = "name method seed score rounds metrics best history communication privacy time memory participants left_out"
    assert " ".join(found) == f"{keys} environment audit"
    counts = {"upload_bytes", "download_bytes", "setup_bytes", "student_delivery_bytes", "total_bytes"}
    assert set(found["communication"]) == counts | {"by_kind"}
    assert set(found["time"]) == {"total_s", "clients_s", "server_s", "evaluate_s", "transfer_s", "parts"}
    assert set(found["memory"]) == {"peak_rss_bytes", "peak_device_bytes"}
    assert set(found["best"]) == {"round", "metrics", "communication", "validation_samples"}
    assert set(found["participants"][0]) == {"id", "samples", "architecture", "parameters", "metrics"}
    assert [one["round"] for one in found["history"]] == [1, 2, 3, 4, 5]
    assert found["metrics"]["student/test/accuracy"] > 0.7 > found["metrics"]["specialists/test/accuracy"]

    assert [line.split()[1] for line in out.splitlines() if line.startswith("round")] == [f"{i}/5" for i in range(1, 6)]
    table = {line.strip().split("  ")[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert f"{found['metrics']['student/test/accuracy']:.4f}" in table["Student, test accuracy"]
    assert f"{found['metrics']['student/test/nll']:.4f}" in table["Student, test NLL"]
    assert f"({found['communication']['upload_bytes']:,} bytes)" in table["Sent up by clients"]
    assert "Specialists, test accuracy" in table and "Seconds" in table

    assert (folder / "recipe.yaml").is_file() and any((folder / "tensorboard").iterdir())
    shown = curves(read(folder / "tensorboard"))
    accuracies = {one["round"]: one["metrics"]["student/test/accuracy"] for one in found["history"]}
    assert shown["student/test/accuracy"] == pytest.approx(accuracies)


def test_bytes_add_up(straight):
    found = summary(straight[0])
    sent = found["communication"]
    for direction, key in (("up", "upload_bytes"), ("down", "download_bytes"), ("setup", "setup_bytes")):
        assert sum(v for kind, v in sent["by_kind"].items() if kind.startswith(f"{direction}/")) == sent[key]
    totals = {key: sent[key] for key in ("upload_bytes", "download_bytes", "setup_bytes")}
    assert sent["total_bytes"] == sum(totals.values()) + sent["student_delivery_bytes"]
    assert found["history"][-1]["communication"] == {**totals, "transfer_s": found["time"]["transfer_s"]}
    assert sent["setup_bytes"] == 4 * 100 * 64 * 4  # four clients get 100 images of 64 floats


# --- interruptions


def test_a_killed_run_resumes_to_the_same_result(recipe, straight, tmp_path, capsys):
    folder = tmp_path / "run"
    process = start("fit", "--recipe", recipe, "--output-dir", folder)
    wait_for_round(process, folder, 2)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    truncated = tmp_path / "truncated"
    shutil.copytree(folder, truncated)

    code, _, err = here(capsys, "fit", "--recipe", recipe, "--output-dir", folder, "--resume")
    assert code == 0 and "resuming after round" in err
    assert outcome(folder) == outcome(straight[0])

    # a newest checkpoint that was cut off is passed over
    newest = max((truncated / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    code, _, err = here(capsys, "fit", "--recipe", recipe, "--output-dir", truncated, "--resume")
    assert code == 0 and f"{newest}: damaged checkpoint passed over" in err
    assert outcome(truncated) == outcome(straight[0])


def test_ctrl_c_saves_and_names_the_command_that_goes_on(recipe, straight, tmp_path):
    folder = tmp_path / "a run"
    process = start("fit", "--recipe", recipe, "--output-dir", folder)
    wait_for_round(process, folder, 1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and "Traceback" not in err and "stopping after this round" in err
    assert not (folder / "summary.json").exists()
    told = shlex.split(err.splitlines()[-1])
    assert told[:3] == ["python", "-m", "fdl"] and told[-1] == "--resume"
    assert finish(start(*told[3:]))[0] == 0
    assert outcome(folder) == outcome(straight[0])


def test_more_rounds_leave_the_finished_run_alone_until_there_is_something_better(
    recipe, tmp_path, capsys, monkeypatch
):
    from fdl.loop import FederatedLoop

    base = ["fit", "--recipe", recipe, *QUICK, "callbacks=[csv]"]
    more = [*base, "federation.rounds=3", "--resume", "--output-dir"]
    folder = tmp_path / "run"
    assert here(capsys, *base, "--output-dir", folder)[0] == 0
    before = [(folder / name).read_bytes() for name in ("summary.json", "recipe.yaml")]

    with monkeypatch.context() as patch:
        patch.setattr(FederatedLoop, "run_round", lambda self, round: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            here(capsys, *more, folder)
    assert [(folder / name).read_bytes() for name in ("summary.json", "recipe.yaml")] == before
    assert here(capsys, *base, "--resume", "--output-dir", folder)[0] == 0  # still complete as it was

    assert here(capsys, *more, folder)[0] == 0
    whole = tmp_path / "whole"
    assert here(capsys, *base, "federation.rounds=3", "--output-dir", whole)[0] == 0
    assert outcome(folder) == outcome(whole)


# --- what cannot be resumed


def test_resume_needs_a_checkpoint_of_the_same_recipe(recipe, straight, tmp_path, capsys):
    fit = ["fit", "--recipe", recipe, "--output-dir"]
    code, _, err = here(capsys, *fit, tmp_path / "none", "--resume")
    assert code == 2 and "there is no checkpoint to resume from" in err

    changed = ["local_training.steps=9", "seed=4"]
    code, _, err = here(capsys, *fit, straight[0], "--resume", *changed)
    assert code == 2 and "local_training.steps: 60 there, 9 here" in err and "seed: 0 there, 4 here" in err
    code, _, err = here(capsys, *fit, straight[0], *changed)
    assert code == 2 and "holds a finished run of another recipe" in err and "--output-dir" in err

    damaged = tmp_path / "damaged"
    shutil.copytree(straight[0], damaged)
    (damaged / "summary.json").unlink()
    files = list((damaged / "checkpoints").glob("*.safetensors"))
    for file in files:
        file.write_bytes(b"")
    code, _, err = here(capsys, *fit, damaged, "--resume")
    assert code == 2 and len(files) == 2 and all(str(file) in err for file in files)


# --- mistakes that only the data or the machine show


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.args.proxy=0"],
            ["data.args.proxy: missing: method federated_distillation needs a proxy set", "such as 0.3"],
        ),
        (["student.args.num_classes=7"], ["student.args.num_classes: 7", "10 classes"]),
        (["specialists.1.args.num_classes=12"], ["specialists.1.args.num_classes: 12", "10 classes"]),
        (["federation.clients=5000"], ["partition", "5000"]),
        (["partition.args.alpha=0"], ["partition", "alpha", "> 0"]),
        (["partition.args.alpha=-1"], ["partition", "alpha", "> 0"]),
        (["federation.client_fraction=0.01"], ["federation.client_fraction", "selects nobody"]),
        (["method={target: feddf, args: {architectures: specialists}}", "specialists=[]"], ["specialists: missing"]),
        (["data.args.test=1797"], ["test"]),
        (["fabric.devices=two"], ["fabric", "two"]),
        (["fabric.num_nodes=2"], ["fabric.num_nodes", "MASTER_ADDR", "torchrun"]),
        (["fabric.strategy=fsdp", "fabric.accelerator=cpu"], ["fabric.strategy: fsdp needs GPUs", "take auto or ddp"]),
        (["fabric.strategy=nonsense"], ["fabric.strategy", "'nonsense'"]),
        (["fabric.accelerator=tpu"], ["fabric", "accelerator=tpu"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) and "=" in value[0] else "",
)
def test_a_mistake_ends_with_one_message_and_leaves_no_run(recipe, tmp_path, capsys, overrides, words):
    folder = tmp_path / "run"
    code, out, err = here(capsys, "fit", "--recipe", recipe, "--output-dir", folder, *overrides)
    assert code == 2 and out == ""
    assert err.count("error: ") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    assert not folder.exists()


# --- comparisons


def test_compare_runs_all_once_and_its_tables_agree_with_the_runs(recipe, tmp_path, capsys):
    folder = tmp_path / "compare"
    line = ["compare", "--recipe", recipe, *QUICK, "callbacks=[]", "--output-dir", folder]
    code, out, _ = here(capsys, *line)
    assert code == 0
    paths = sorted(folder.glob("*/seed-*/summary.json"))
    assert [str(path.parent.relative_to(folder)) for path in paths] == [
        "centralized/seed-0",
        "centralized/seed-1",
        "ours/seed-0",
        "ours/seed-1",
    ]
    stamps = [path.stat().st_mtime_ns for path in paths]

    with open(folder / "compare.csv", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    runs = {path.parent.parent.name: [] for path in paths}
    for path in paths:
        runs[path.parent.parent.name].append(json.loads(path.read_text()))
    best = {name: [run["best"]["metrics"]["student/test/accuracy"] for run in some] for name, some in runs.items()}
    for name, row in rows.items():
        assert float(row["student_best_mean"]) == pytest.approx(sum(best[name]) / 2)
        assert f"{sum(best[name]) / 2:.4f} ± " in (folder / "compare.md").read_text(encoding="utf-8")
        assert f"{sum(best[name]) / 2:.4f} ± " in out
    ratios = [a / b for a, b in zip(best["ours"], best["centralized"])]
    assert float(rows["ours"]["kte_mean"]) == pytest.approx(sum(ratios) / 2)
    sent = [run["communication"] for run in runs["ours"]]
    total = sum(one["upload_bytes"] + one["download_bytes"] for one in sent)
    assert float(rows["ours"]["bytes_total_mean"]) == total / 2
    for seed in (0, 1):
        events = read(folder / "tensorboard" / f"ours-seed{seed}")
        values, metrics = hparams(events)
        assert values == {"variant": "ours", "method": "federated_distillation", "seed": seed}
        assert "student/test/accuracy" in metrics
        last = runs["ours"][seed]["metrics"]["student/test/accuracy"]
        assert curves(events)["student/test/accuracy"][2] == pytest.approx(last)

    code, again, err = here(capsys, *line)
    assert code == 0 and err.count("complete already") == 4
    assert again == out
    assert [path.stat().st_mtime_ns for path in paths] == stamps
