"""Nothing that somebody else wrote, and no finished run, is ever lost."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import fdl
from fdl.__main__ import main
from fdl.attacks.base import Attack
from fdl.callbacks.base import Callback
from fdl.errors import UserError
from fdl.federation.snapshot import BEFORE, BEST
from fdl.loop import FederatedLoop
from fdl.runs import run as runs
from fdl.runs.export import export
from fdl.state import checkpoint, run_folder
from fdl.utils.interrupts import Interrupted
from fdl.utils.locks import LOCK, FolderLock, Holder, require_unlocked
from fdl.utils.paths import expanded
from tests.cli.test_main import files_of

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


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe's file in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    return "small.yaml"


@pytest.fixture
def finished(recipe):
    """The folder of a finished run."""
    fdl.fit(recipe, output_dir="run")
    return Path("run")


def command(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def failing(monkeypatch, at, error=None):
    """Every run fails at the start of a round."""
    rounds = FederatedLoop.run_round

    def run_round(self, round):
        if round == at:
            raise error or RuntimeError("crash")
        rounds(self, round)

    monkeypatch.setattr(FederatedLoop, "run_round", run_round)


# --- files that fdl did not write

FOREIGN = {
    "clients/site_a/private.csv": "the only copy of site A's table",
    "checkpoints/vit_pretrained.pth": "weights",
    "metrics.csv": "measured by hand",
    "summary.json": "{}",
    "tensorboard/notes.txt": "mine",
    "recipe.yaml": "method: fedavg",
}


@pytest.mark.parametrize("names", [[name] for name in FOREIGN] + [list(FOREIGN), ["src/main.py"]])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_somebody_elses_is_refused_whatever_it_holds(recipe, capsys, names, overwrite):
    for name in names:
        Path("project", name).parent.mkdir(parents=True, exist_ok=True)
        Path("project", name).write_text(FOREIGN.get(name, "print()"))
    before = files_of("project")
    code, _, err = command(capsys, "fit", "--recipe", recipe, "--output-dir", "project", *overwrite)
    assert code == 2 and "project: is no empty folder, and holds no run of fdl, but " in err
    assert all(name.partition("/")[0] in err for name in names)
    assert files_of("project") == before and not Path("project/.fdl.json").exists()


def test_the_current_folder_is_refused_unless_it_is_empty(recipe, capsys, monkeypatch):
    code, _, err = command(capsys, "fit", "--recipe", recipe, "--output-dir", ".")
    assert code == 2 and "holds no run of fdl, but small.yaml" in err
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    fdl.fit("../small.yaml", output_dir=".")
    assert Path("summary.json").is_file()


def test_a_folder_in_which_only_this_process_writes_its_log_is_empty(tmp_path):
    """As after ``mkdir run; fdl fit --output-dir run > run/log.txt``."""
    script = "from pathlib import Path; from fdl.state import run_folder; print(run_folder.others(Path('.')))"
    environment = {**os.environ, "PYTHONPATH": str(Path(fdl.__file__).parents[1])}
    with open(tmp_path / "log.txt", "w") as log:
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stdout=log, env=environment, check=True)
    assert (tmp_path / "log.txt").read_text() == "[]\n"
    assert run_folder.others(tmp_path) == ["log.txt"]


def test_a_loop_from_python_mixes_with_no_other_run(finished):
    from fdl.build import build

    before = files_of(finished)
    with pytest.raises(UserError, match=r"run: holds files of a run: best\.safetensors, metrics\.csv"):
        build(fdl.load_recipe(RECIPE), "run").run()
    assert files_of(finished) == before


# --- a run in the place of another


@pytest.mark.parametrize("at", [1, 2])
def test_a_replaced_run_comes_back_where_the_new_one_saves_no_round(finished, capsys, monkeypatch, at):
    export(finished, "torch")
    (finished / "export-torch" / "mine.txt").write_text("mine")
    before = files_of(finished)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        failing(patch, at)
        fdl.fit("small.yaml", output_dir=finished, overwrite=True, overrides=["seed=1"])
    after = files_of(finished)
    if at == 1:
        assert after == before
    else:  # round 1 of the new run is saved: there is something to go on with
        assert fdl.load_recipe(finished / "recipe.yaml").seed == 1 and "summary.json" not in after
        assert [name for name in after if name.startswith("export")] == ["export-torch/mine.txt"]
        assert fdl.fit("small.yaml", output_dir=finished, resume=True, overrides=["seed=1"]).summary["seed"] == 1
    assert not any(name.startswith(".") for name in after)


def test_a_process_killed_while_it_replaces_a_run_loses_nothing(finished, monkeypatch):
    """At whichever file it was: all of the earlier run, or, once a round of the new one is saved, all of that."""
    before, original = files_of(finished), run_folder._move

    class Killed(BaseException):
        pass

    def killed_after(most):
        moved = []

        def move(path, target):
            if len(moved) == most:
                raise Killed
            moved.append(path)
            original(path, target)

        return move

    for most in range(len(before) + 1):  # one file more: the mark that fdl made the folder
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(run_folder, "_move", killed_after(most))
            run_folder.move_aside(finished)
        run_folder.recover(finished)
        assert files_of(finished) == before and run_folder.is_run(finished)
    run_folder.move_aside(finished)
    (finished / "metrics.csv").write_text("of the new run, which was killed in its first round")
    run_folder.recover(finished)
    assert files_of(finished) == before
    run_folder.move_aside(finished)
    checkpoint.write_round(finished / "checkpoints", 1, {"round": 1})
    run_folder.recover(finished)
    assert run_folder.last_round(finished) == 1 and set(files_of(finished)) < {*before, *files_of(finished)}
    assert not (finished / run_folder.REPLACED).exists()


def test_the_summary_is_there_before_attacks_and_callbacks_can_fail(recipe):
    class Figure(Callback):
        def on_fit_end(self, loop, summary):
            assert json.loads((loop.folder / "summary.json").read_text())["rounds"] == 2
            raise RuntimeError("no such font")

    from fdl.build import federation as module

    built = module.build_federation

    def build(*arguments):
        loop = built(*arguments)
        loop.callbacks.append(Figure())
        return loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_federation", build)
        with pytest.raises(RuntimeError, match="no such font"):
            fdl.fit(recipe, output_dir="run")
        with pytest.raises(UserError, match="nonsense"):
            fdl.fit(recipe, output_dir="other", overrides=["evaluation.attacks=[tests.runs.test_run_folder.Nonsense]"])
    assert runs.is_complete(fdl.load_recipe(recipe), Path("run"))
    assert fdl.fit(recipe, output_dir="run", resume=True).summary["rounds"] == 2
    asked = fdl.load_recipe(recipe, ["evaluation.attacks=[loss_threshold]"])
    assert json.loads(Path("other/summary.json").read_text())["audit"] is None
    assert not runs.is_complete(asked, Path("other"))


class Nonsense(Attack):
    """An attack that cannot be tried."""

    name = "nonsense"

    def run(self, subject):
        raise UserError("nonsense: cannot be tried on this run")


def test_a_second_audit_keeps_the_first(finished, capsys):
    line = ["audit", "--run", finished, "--attacks", "loss_threshold"]
    assert command(capsys, *line)[0] == 0
    first = (finished / "audit.json").read_bytes()
    for number in (1, 2):
        assert command(capsys, *line)[0] == 0
        assert (finished / f"audit-{number}.json").read_bytes() == first
    assert {path.name for path in (finished / "tensorboard").glob("audit*")} == {"audit", "audit-1", "audit-2"}
    (finished / "audit.json").write_text("newest")
    assert fdl.fit("small.yaml", output_dir=finished, overwrite=True).summary["rounds"] == 2
    assert not list(finished.rglob("audit*"))


# --- two processes in one folder

HOLD = """
    import sys
    from pathlib import Path
    from fdl.utils.locks import FolderLock
    with FolderLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def holding(folder) -> subprocess.Popen:
    """Another process that has a folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(fdl.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_that_another_process_has_is_refused(recipe, capsys):
    process = holding("run")
    for more in ([], ["--resume"], ["--overwrite"]):
        code, _, err = command(capsys, "fit", "--recipe", recipe, "--output-dir", "run", *more)
        assert code == 2 and f"run: is in use by process {process.pid} on {Holder.current().host} since " in err
    process.communicate()
    assert not Path("run").exists()  # it was made for the lock, and nothing was put there
    fdl.fit(recipe, output_dir="run")
    assert not Path("run", LOCK).exists()


def test_the_lock_of_a_killed_process_is_taken_over(recipe):
    process = holding("run")
    process.kill()
    process.wait()
    assert Path("run", LOCK).exists()
    assert fdl.fit(recipe, output_dir="run").summary["rounds"] == 2


def test_the_lock_of_another_machine_is_respected_until_somebody_deletes_it(recipe, monkeypatch):
    Path("run").mkdir()
    lock = Path("run", LOCK)
    lock.write_text(json.dumps({"pid": 1, "host": "node7", "since": "2026-01-01 00:00:00", "job": "12", "restart": 0}))
    with pytest.raises(UserError, match=r"in use by process 1 on node7 since 2026.*delete run/\.fdl\.lock"):
        fdl.fit(recipe, output_dir="run")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(UserError, match="node7"):
        require_unlocked(Path("run"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # Slurm has requeued the job whose node has failed
    with FolderLock(Path("run")):
        pass
    assert not lock.exists()


def test_without_locks_of_the_system_the_number_of_the_process_decides(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    process = holding(tmp_path)
    with pytest.raises(UserError, match=f"process {process.pid}"):
        require_unlocked(tmp_path)
    process.kill()
    process.wait()
    with FolderLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"):
        require_unlocked(tmp_path)


# --- the best student


def test_the_best_student_is_kept_whatever_rounds_are_saved(recipe, monkeypatch):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2, 5: 0.9}
    weights = scored(monkeypatch, scores)
    rounds = ["federation.rounds=5", "checkpoint.every=4"]
    summary = fdl.fit(recipe, output_dir="run", overrides=rounds).summary
    assert summary["best"]["round"] == 2
    best = checkpoint.load_best(Path("run") / BEST)
    assert best["round"] == 2
    assert all(torch.equal(best["student"][name], tensor) for name, tensor in weights[2].items())
    folder = export(Path("run"), "torch")
    assert "round 2 of 5" in (folder / "README.md").read_text()

    Path("run", BEST).unlink()
    with pytest.raises(UserError, match="the student of round 2, the run's best, is not there"):
        export(Path("run"), "torch", Path("again"))
    assert "round 5 of 5" in (export(Path("run"), "torch", Path("last"), which="last") / "README.md").read_text()
    for path, number in checkpoint.checkpoints(Path("run/checkpoints")).items():
        if number == 5:
            path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="the student of round 5, the run's last, is not there"):
        export(Path("run"), "torch", Path("damaged"), which="last")


@pytest.mark.parametrize("better", [{3: 0.9}, {3: 0.1}], ids=["again", "not again"])
def test_a_killed_run_goes_on_from_the_best_student_of_its_checkpoint(recipe, monkeypatch, better):
    """Whether or not the better one that came after it comes again, as it may not on other devices."""
    scores = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.1, 5: 0.1}
    weights = scored(monkeypatch, scores)
    rounds = ["federation.rounds=5", "checkpoint.every=2"]
    with monkeypatch.context() as patch:
        failing(patch, 4)
        with pytest.raises(RuntimeError, match="crash"):
            fdl.fit(recipe, output_dir="run", overrides=rounds)
    assert checkpoint.round_of(Path("run", BEST)) == 3 and checkpoint.round_of(Path("run", BEFORE)) == 1
    first = weights[1]
    scores.update(better)
    number = fdl.fit(recipe, output_dir="run", overrides=rounds, resume=True).summary["best"]["round"]
    assert number == (3 if better[3] == 0.9 else 1)
    best = checkpoint.load_best(Path("run", BEST))
    assert best["round"] == number and not Path("run", BEFORE).exists()
    expected = first if number == 1 else weights[3]
    assert all(torch.equal(best["student"][name], tensor) for name, tensor in expected.items())


def scored(monkeypatch, scores):
    """Let rounds have these accuracies on validation data; returns the students' weights by round."""
    from fdl import loop as module
    from fdl.state.weights import module_state

    evaluate, weights = module.evaluate, {}

    def pretended(loop, record, last=False):
        evaluate(loop, record, last)
        record["metrics"]["student/validation/accuracy"] = scores[record["round"]]
        weights[record["round"]] = {name: tensor.clone() for name, tensor in module_state(loop.server.student).items()}

    monkeypatch.setattr(module, "evaluate", pretended)
    return weights


# --- signals


class Signal(Callback):
    """Sends this process a signal in a round."""

    def __init__(self, number, round=2):
        self.number, self.at = number, round

    def on_round_start(self, loop, round):
        if round == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_every_signal_to_stop_saves_the_round_and_is_told_by_the_exit_code(recipe, capsys, name):
    number = getattr(signal, name)
    line = ["fit", "--recipe", recipe, "--output-dir", "run", "federation.rounds=9", "checkpoint.every=9"]
    callback = f"callbacks=[csv, {{target: tests.runs.test_run_folder.Signal, args: {{number: {int(number)}}}}}]"
    before = signal.getsignal(number)
    code, _, err = command(capsys, *line, callback, "--overwrite")
    assert code == 128 + number and f"{name}: stopping after this round" in err
    assert err.splitlines()[-1].endswith("--resume") and "--overwrite" not in err
    assert run_folder.last_round(Path("run")) == 2 and not Path("run", LOCK).exists()
    assert signal.getsignal(number) == before
    assert command(capsys, *line, "federation.rounds=3", "--resume")[0] == 2  # fewer rounds than it began with
    assert command(capsys, *line, "--resume")[0] == 0


def test_an_ignored_signal_stays_ignored(recipe, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        callback = f"callbacks=[{{target: tests.runs.test_run_folder.Signal, args: {{number: {int(signal.SIGHUP)}}}}}]"
        assert fdl.fit(recipe, output_dir="run", overrides=[callback]).summary["rounds"] == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_the_first_round_leaves_the_earlier_run(finished, monkeypatch):
    before = files_of(finished)
    failing(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(Interrupted) as caught:
        fdl.fit("small.yaml", output_dir=finished, overwrite=True)
    assert caught.value.saved is False and files_of(finished) == before


# --- going on


def write_arrays(path, shift=0.0):
    draw = np.random.default_rng(0)
    x, y = draw.random((60, 1, 4, 4), dtype=np.float32), draw.integers(0, 3, 60)
    path.parent.mkdir(exist_ok=True)
    np.savez(path, x_train=(x + shift).clip(0, 1), y_train=y, x_test=x[:20], y_test=y[:20])


def test_a_run_goes_on_with_data_that_have_moved_and_with_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_arrays(Path("a/x.npz"))
    write_arrays(Path("b/moved.npz"))
    write_arrays(Path("c/x.npz"), shift=0.1)
    data = {"target": "arrays", "args": {"path": "a/x.npz", "validation": 10}}
    recipe = {**RECIPE, "data": data}
    whole = fdl.fit(recipe, output_dir="whole").summary
    fdl.fit({**recipe, "federation": {"clients": 2, "rounds": 1}}, output_dir="run")
    with pytest.raises(UserError, match="the data, or who holds which of them, changed"):
        fdl.fit(recipe, output_dir="run", overrides=["data.args.path=c/x.npz"], resume=True)
    assert fdl.load_recipe("run/recipe.yaml").data.args["path"] == "a/x.npz"
    moved = fdl.fit(recipe, output_dir="run", overrides=["data.args.path=b/moved.npz"], resume=True).summary
    assert moved["metrics"] == whole["metrics"] and moved["rounds"] == 2
    assert fdl.load_recipe("run/recipe.yaml").data.args["path"] == "b/moved.npz"
    # a complete run, too, is that of these data only where they are the same
    with pytest.raises(UserError, match="the data, or who holds which of them, changed"):
        fdl.fit(recipe, output_dir="run", overrides=["data.args.path=c/x.npz"], resume=True)
    assert (
        fdl.fit(recipe, output_dir="run", overrides=["data.args.path=a/x.npz"], resume=True).summary["metrics"]
        == whole["metrics"]
    )


FREED = [
    ["name=other", "output_dir=elsewhere", "profile=true"],
    ["evaluation.batch_size=7"],
    ["client_execution=vectorized"],
    ["federation.client_state=disk"],
    ["inference.cache=answers"],
    ["data.args.batch_size=3"],
    ["checkpoint.every=2", "checkpoint.keep=1"],
    ["evaluation.metrics=[accuracy, nll, ece]"],
    ["evaluation.evaluators=[{target: linear_probe, args: {shots: [2]}}]"],
    ["evaluation.specialists=false"],
    ["callbacks=[csv, tests.runs.test_run_folder.Nothing]"],
]


class Nothing(Callback):
    """Watches, and says nothing."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of three rounds that was stopped after the first, and what it would have come to."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = {**RECIPE, "federation": {"clients": 2, "rounds": 3}}
    whole = fdl.fit(recipe, output_dir=folder / "whole").summary
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, 2)
        with pytest.raises(RuntimeError, match="crash"):
            fdl.fit(recipe, output_dir=folder / "run")
    return recipe, folder / "run", whole


@pytest.mark.parametrize("overrides", FREED, ids=lambda overrides: overrides[0])
def test_what_changes_no_result_may_change_when_a_run_goes_on(begun, tmp_path, monkeypatch, overrides):
    import shutil

    recipe, folder, whole = begun
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    found = fdl.fit(recipe, output_dir="run", overrides=overrides, resume=True).summary
    key = "student/test/accuracy"
    assert [one["metrics"][key] for one in found["history"]] == pytest.approx(
        [one["metrics"][key] for one in whole["history"]]
    )
    assert found["communication"] == whole["communication"]
    if "ece" in overrides[0]:
        assert ["student/test/ece" in one["metrics"] for one in found["history"]] == [False, True, True]


def test_what_a_finished_run_is_measured_by_cannot_change(finished):
    with pytest.raises(UserError, match=r"no round to come that these could measure:\n.*evaluation\.metrics"):
        fdl.fit("small.yaml", output_dir=finished, overrides=["evaluation.metrics=[ece]"], resume=True)
    more = ["evaluation.metrics=[accuracy, ece]", "federation.rounds=3"]
    assert (
        "student/test/ece" in fdl.fit("small.yaml", output_dir=finished, overrides=more, resume=True).summary["metrics"]
    )


# --- paths


def test_home_and_variables_in_paths_are_replaced_or_refused(recipe, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expanded("~/a") == tmp_path / "home/a" and expanded("$SCRATCH/${SCRATCH}x").parts[-1] == "scratchx"
    assert expanded("cost $5") == Path("cost $5")
    assert runs.folder_of(fdl.load_recipe(recipe, ["output_dir=$SCRATCH/runs"])) == tmp_path / "scratch/runs/small"
    code, _, err = command(capsys, "fit", "--recipe", recipe, "output_dir=$NOWHERE/runs")
    assert code == 2 and "output_dir: $NOWHERE/runs: the environment variable NOWHERE is not set" in err
    code, _, err = command(capsys, "fit", "--recipe", recipe, "--output-dir", "$NOWHERE/x")
    assert code == 2 and "NOWHERE is not set" in err
    assert not Path("$NOWHERE").exists()


@pytest.mark.parametrize("line", ["fit", "check"])
def test_a_name_that_no_file_system_takes_is_refused(recipe, capsys, line):
    long = "x" * 300
    for more in (["--output-dir", long], ["--output-dir", f"a/{long}/b"], ["output_dir=" + long]):
        code, _, err = command(capsys, line, "--recipe", recipe, *more)
        assert code == 2 and "Traceback" not in err and "File name too long" in err and len(err) < 1200
    for other in (["audit", "--run", long], ["export", "--run", long, "--format", "torch"], ["fit", "--recipe", long]):
        code, _, err = command(capsys, *other)
        assert code == 2 and err.startswith("error: xxx")


def test_check_foresees_what_fit_would_refuse(finished, capsys, monkeypatch):
    monkeypatch.setattr("fdl.cli.check.describe_federation", lambda recipe, folder: "")
    code, out, _ = command(capsys, "check", "--recipe", "small.yaml", "--output-dir", finished)
    assert code == 0 and "fdl fit would stop: run: holds a finished run of this recipe" in out
    assert "would stop" not in command(capsys, "check", "--recipe", "small.yaml", "--output-dir", "new")[1]
    monkeypatch.setattr("fdl.runs.run.os.access", lambda *_: False)
    code, _, err = command(capsys, "check", "--recipe", "small.yaml", "--output-dir", "new")
    assert code == 2 and "new: cannot be written" in err and "read-only" in err
    assert command(capsys, "fit", "--recipe", "small.yaml", "--output-dir", "new")[::2] == (2, err)
