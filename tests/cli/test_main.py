import csv
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from fdl.__main__ import main
from fdl.callbacks.base import CallbackList
from fdl.metrics.tasks import TASKS
from fdl.recipe import load
from fdl.runs import run as runs

RECIPE = """\
# python -m fdl fit --recipe recipes/small.yaml
method: fedavg
data: digits
partition: {target: dirichlet, args: {alpha: 0.5}}
federation: {clients: 3, rounds: 2}
student: {target: mlp, args: {hidden: [8]}}
callbacks: []
fabric: {accelerator: cpu}
compare:
  seeds: [0, 1]
  variants:
    fedavg: {}
    slow: {local_training.optimizer.args.lr: 0.01}
    centralized: {method: centralized}
"""


CHECKPOINT = "round-000001-0123456789abcdef.safetensors"


class Federation:
    """Stands in for `build_federation`: counts what is run and leaves the files that a loop leaves."""

    def __init__(self):
        self.runs, self.error, self.failing = [], None, None

    def build(self, recipe, folder):
        federation = self

        class Loop:
            callbacks = CallbackList()
            server = types.SimpleNamespace(task="classification", classes=[], model_kwargs={})

            def run(self, resume=False):
                federation.runs.append((recipe, resume))
                (folder / runs.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                (folder / runs.CHECKPOINTS / CHECKPOINT).touch()
                error = federation.error or (federation.failing and federation.failing(recipe))
                if error:
                    raise error
                return summary(recipe)

        loop = Loop()
        loop.folder = folder
        return loop


def summary(recipe) -> dict:
    sent = {"upload_bytes": 1000, "download_bytes": 500, "setup_bytes": 0}
    metrics = {"student/test/accuracy": 0.5 + recipe.seed / 10, "student/validation/accuracy": 0.5}
    rounds = recipe.federation.rounds
    record = {"round": rounds, "metrics": metrics, "communication": sent, "cohort": [0], "dropped": [], "refused": {}}
    record |= {"clients": {}, "seconds": {"clients": 1.0}}
    return {
        "name": recipe.name,
        "method": recipe.method.target,
        "seed": recipe.seed,
        "score": {"metric": "accuracy", "higher_is_better": True},
        "rounds": rounds,
        "metrics": metrics,
        "best": {"round": rounds, "metrics": metrics, "communication": sent},
        "history": [record],
        "communication": {**sent, "by_kind": {}},
        "time": {"total_s": 1.0, "clients_s": 1.0, "server_s": 0.0, "evaluate_s": 0.0},
        "participants": [],
    }


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def federation(here, monkeypatch):
    fake = Federation()
    module = types.ModuleType("fdl.build.federation")
    module.build_federation = fake.build
    monkeypatch.setitem(sys.modules, "fdl.build.federation", module)
    return fake


def fdl(capsys, line: str) -> tuple[int, str, str]:
    code = main(line.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


FIT = "fit --recipe recipes/small.yaml"


# --- what goes wrong before anything runs


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fitt", ["invalid choice: 'fitt'; did you mean 'fit'?"]),
        ("fi", ["invalid choice: 'fi'; did you mean 'fit'?"]),
        ("export --run x --format onx", ["argument --format: invalid choice: 'onx'; did you mean 'onnx'?"]),
        ("fit", ["the following arguments are required: --recipe"]),
        ("fit --recipe", ["argument --recipe: expected one argument"]),
        ("fit --recipe nothing.yaml", ["nothing.yaml: there is no such recipe file", "recipes/small.yaml"]),
        ("fit --recipe recipes/smal.yaml", ["did you mean recipes/small.yaml?"]),
        ("fit --recipe recipes", ["recipes: there is no such recipe file"]),
        (f"{FIT} --rounds 5", ["unknown option --rounds", "set without dashes: federation.rounds=5"]),
        (f"{FIT} --rounds=5", ["set without dashes: federation.rounds=5"]),
        (f"{FIT} --local_training.batch_size=5", ["set without dashes: local_training.batch_size=5"]),
        (f"{FIT} --resum", ["unknown option --resum; did you mean '--resume'?"]),
        (f"{FIT} federation.rounds", ["override 'federation.rounds': expected key=value"]),
        (f"{FIT} federation.rouds=1", ["federation.rouds: unknown key; did you mean 'rounds'?"]),
        (f"{FIT} partition.args.alpha=0", ["partition.args.alpha: alpha must be"]),
        (f"check{FIT[3:]} student=mlpp", ["student: unknown module 'mlpp'; did you mean 'mlp'?"]),
        (f"compare{FIT[3:]} --seeds a", ["argument --seeds: expected whole numbers with commas, got 'a'"]),
        (
            f"compare{FIT[3:]} --methods fedvg",
            ["'fedvg' is neither a variant of this recipe nor a method", "'fedavg'?"],
        ),
        (f"compare{FIT[3:]} --methods distillation", ["teacher: missing: method distillation needs teacher"]),
        (f"{FIT} --resume", ["runs/small: there is no checkpoint to resume from"]),
        (f"{FIT} --output-dir recipes/small.yaml", ["recipes/small.yaml: is a file, expected a folder"]),
        ("list method-s", ["nothing is called 'method-s'; did you mean 'methods'?"]),
        ("list nonsense", ["nothing is called 'nonsense'; fdl list takes methods, modules,"]),
        ("list tim", ["nothing is called 'tim'; did you mean 'timm'?"]),
        ("list modules tim", ["there is no module 'tim'; did you mean 'timm'?"]),
        ("list keys seed", ["'keys' is no kind of plug-in; fdl list takes"]),
        ("list a b c", ["expected at most a kind and a name"]),
        (f"{FIT} name={'x' * 300}", ["name: names a folder, and has 300 bytes; at most 200"]),
        (f"{FIT} data.args.proxy=public/notes.txt", ["data.args.proxy: 'public/notes.txt' is a path"]),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(federation, capsys, line, words):
    code, out, err = fdl(capsys, line)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("error: ") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert federation.runs == [] and not Path("runs").exists()


def test_a_process_ends_with_the_code(here):
    command = [sys.executable, "-m", "fdl", *FIT.split(), "seed=x"]
    result = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert result.returncode == 2
    expected = "error: recipes/small.yaml: one problem\n  - seed: expected int, got 'x' (from the override 'seed=x')\n"
    assert result.stderr == expected


@pytest.mark.parametrize("line", ["--help", "fit --help", "list", f"{FIT} seed=x", "compare --recipe nothing.yaml"])
def test_no_torch_for_help_lists_and_mistakes(here, line):
    code = f"""
        import sys
        from fdl.__main__ import main
        try:
            main({line.split()!r})
        except SystemExit:
            pass
        print([name for name in ("torch", "lightning", "sklearn", "rich") if name in sys.modules], file=sys.stderr)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    assert result.stderr.splitlines()[-1] == "[]"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[1])}


# --- help and lists


@pytest.mark.parametrize("command", ["fit", "check", "compare", "list"])
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"python -m fdl {command}" in capsys.readouterr().out


def test_no_command_prints_the_help(capsys):
    code, out, err = fdl(capsys, "")
    assert (code, err) == (0, "")
    assert out.startswith("usage: ") and "Run a federation." in out


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
@pytest.mark.parametrize("line", ["list", "list keys", f"{FIT} seed=μ"])
def test_output_in_any_encoding(here, encoding, line):
    """Letters that it lacks are replaced, and end nothing: μ is in none of these."""
    command = [sys.executable, "-m", "fdl", *line.split()]
    result = subprocess.run(command, capture_output=True, env={**_environment(), "PYTHONIOENCODING": encoding})
    printed = (result.stdout + result.stderr).decode(encoding)
    assert result.returncode == (2 if "seed" in line else 0) and "Traceback" not in printed
    assert "'?'" in printed if "seed" in line else "federation.rounds" in printed


def test_list_says_what_a_plugin_takes(here, capsys):
    code, out, _ = fdl(capsys, "list text_files")
    assert code == 0 and out.startswith("text_files, a datamodule: Plain text, .txt or .md")
    rows = {line.split()[0]: line for line in out.partition("\nargs\n")[2].splitlines() if line[2:3].strip()}
    assert list(rows)[:2] == ["path", "context"]  # what is needed comes first
    assert "str, needed" in rows["path"] and "tokens of a window" in rows["context"]
    assert "one of 'file', 'paragraph', 'line', default 'file'" in rows["document"]
    assert "public proxy set" in rows["proxy"]  # of the base class
    assert fdl(capsys, "list datamodule text_files") == (code, out, "")
    both = fdl(capsys, "list adam")[1] + fdl(capsys, "list noisy_prototypes")[1]
    assert "adam, an optimizer" in both and "noisy_prototypes, a prototype transfer" in both


def test_list_metrics(here, capsys):
    out = fdl(capsys, "list metrics")[1]
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["nll"] == "classification, language (by default)" and lines["accuracy"].endswith("(by default)")
    assert len(lines) == len({name for task in TASKS.values() for name in task.metrics})


def test_lists_wrap_on_a_terminal(here, capsys, monkeypatch):
    monkeypatch.setattr("fdl.cli.listing._width", lambda: 80)
    for line in ("list", "list keys", "list modules", "list timm"):
        printed = fdl(capsys, line)[1].splitlines()
        assert max(map(len, printed)) <= 80, line
    keys = fdl(capsys, "list keys")[1]
    assert "list of adversaries" in " ".join(keys.split())


def test_list_prints_name_line_and_place(here, capsys):
    code, out, _ = fdl(capsys, "list methods")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("fedavg "))
    assert "Average the clients' weights" in line and "fdl/methods/fedavg.py:" in line


def test_list_recipes_shows_their_first_comment(here, capsys):
    assert fdl(capsys, "list recipes")[1].split(None, 1) == [
        "recipes/small.yaml",
        "python -m fdl fit --recipe recipes/small.yaml\n",
    ]


def test_list_keys_and_singular_names(here, capsys):
    keys = fdl(capsys, "list keys")[1]
    assert "federation.client_fraction" in keys and "fraction of the clients that take part in a round" in keys
    assert fdl(capsys, "list codec") == fdl(capsys, "list codecs")


def test_list_shows_everything(here, capsys):
    out = fdl(capsys, "list")[1]
    for word in (
        "methods\n",
        "  fedprox",
        "optimizers\n",
        "  adamw",
        "recipes\n",
        "  recipes/small.yaml",
        "keys\n",
        "  seed",
    ):
        assert word in out


def test_where_a_missing_file_was_looked_for(here, capsys):
    data = "data={target: text_files, args: {path: notes/a.txt, context: 8, test: 1}}"
    command = ["check", "--recipe", "recipes/small.yaml", data, "method=centralized"]
    code = main(command)
    err = capsys.readouterr().err
    assert code == 2 and f"notes/a.txt: no such file or folder in {here}; paths start where fdl does, not in" in err
    (here / "recipes" / "notes").mkdir()
    (here / "recipes" / "notes" / "a.txt").write_text("text")
    main(command)
    assert f"beside the recipe there is {here}/recipes/notes/a.txt, but paths start where" in capsys.readouterr().err


# --- fit and its folder


def test_fit_leaves_recipe_and_summary(federation, capsys):
    code, out, err = fdl(capsys, f"{FIT} federation.rounds=3 seed=1")
    assert (code, err) == (0, "")
    assert "0.6000" in out and "runs/small" in out
    assert (
        load("runs/small/recipe.yaml")
        == federation.runs[0][0]
        == load("recipes/small.yaml", ["federation.rounds=3", "seed=1"])
    )
    assert json.loads(Path("runs/small/summary.json").read_text())["seed"] == 1


def test_output_dir_is_taken_literally(federation, capsys):
    fdl(capsys, f"{FIT} --output-dir elsewhere/deep seed=1")
    assert Path("elsewhere/deep/summary.json").is_file() and not Path("runs").exists()


def test_overrides_may_stand_anywhere(federation, capsys):
    assert fdl(capsys, "fit seed=3 --recipe recipes/small.yaml federation.rounds=4 --output-dir x name=n")[0] == 0
    recipe = federation.runs[0][0]
    assert (recipe.seed, recipe.federation.rounds, recipe.name) == (3, 4, "n")


def files_of(folder) -> dict[str, bytes]:
    """All files in a folder with their contents, but for those that only note who made it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".fdl.json"
    }


def test_a_finished_run_is_replaced_only_when_asked_for_and_nothing_else_of_its_folder_is(federation, capsys):
    fdl(capsys, FIT)
    mine = ("notes.txt", "checkpoints/vit.pth", "clients/site_a/private.csv", "tensorboard/figure.png")
    for name in (*mine, "metrics.csv", "audit.json"):
        Path("runs/small", name).parent.mkdir(parents=True, exist_ok=True)
        Path("runs/small", name).write_text("old")
    before = files_of("runs/small")
    code, _, err = fdl(capsys, FIT)
    assert code == 2 and "runs/small: holds a finished run of this recipe" in err
    assert "--overwrite" in err and "--output-dir" in err and "--resume" in err
    assert files_of("runs/small") == before and len(federation.runs) == 1

    assert fdl(capsys, f"{FIT} --overwrite")[0] == 0
    assert [resume for _, resume in federation.runs] == [False, False]
    after = files_of("runs/small")
    assert set(before) - set(after) == {"metrics.csv", "audit.json"}
    assert all(after[name] == b"old" for name in mine)
    assert fdl(capsys, f"{FIT} --overwrite --resume")[0] == 2


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_another_recipe_is_never_overwritten(federation, capsys, finished):
    fdl(capsys, FIT)
    if not finished:
        Path("runs/small/summary.json").unlink()
    code, _, err = fdl(capsys, f"{FIT} federation.clients=4 partition.args.alpha=1.0")
    assert code == 2 and len(federation.runs) == 1
    assert (
        "differs in:\n  - partition.args.alpha: 0.5 there, 1.0 here\n  - federation.clients: 3 there, 4 here\n" in err
    )
    assert "--output-dir" in err
    assert fdl(capsys, f"{FIT} federation.clients=4 --overwrite")[0] == 0
    assert load("runs/small/recipe.yaml").federation.clients == 4


def test_more_rounds_need_resume(federation, capsys):
    fdl(capsys, FIT)
    code, _, err = fdl(capsys, f"{FIT} federation.rounds=5")
    assert code == 2 and "--resume goes on with it to more rounds" in err
    assert fdl(capsys, f"{FIT} federation.rounds=5 --resume")[0] == 0
    assert federation.runs[-1][1] is True
    assert json.loads(Path("runs/small/summary.json").read_text())["rounds"] == 5
    code, _, err = fdl(capsys, f"{FIT} --resume")
    assert code == 2 and "federation.rounds: 5 there, 2 here" in err


def test_what_does_not_change_the_result_may_change(federation, capsys):
    fdl(capsys, FIT)
    Path("runs/small/summary.json").unlink()
    line = f"{FIT} --resume callbacks=[csv] checkpoint.keep=5 output_dir=runs compare=null"
    assert fdl(capsys, line)[0] == 0
    assert load("runs/small/recipe.yaml").checkpoint.keep == 5


def test_resume_with_a_changed_recipe_names_the_keys(federation, capsys):
    fdl(capsys, FIT)
    Path("runs/small/summary.json").unlink()
    code, _, err = fdl(capsys, f"{FIT} --resume local_training.batch_size=8")
    assert code == 2 and "cannot resume" in err and "local_training.batch_size: 32 there, 8 here" in err
    code, _, err = fdl(capsys, f"{FIT} --resume fabric.threads=2")  # sums are added up in another order
    assert code == 2 and "fabric.threads: 1 there, 2 here" in err


def test_resume_of_a_complete_run_prints_it_again(federation, capsys):
    first = fdl(capsys, FIT)[1]
    code, again, _ = fdl(capsys, f"{FIT} --resume")
    assert code == 0 and again == first and len(federation.runs) == 1


def test_resume_without_checkpoint(federation, capsys):
    Path("empty").mkdir()
    code, _, err = fdl(capsys, f"{FIT} --resume --output-dir empty")
    assert code == 2 and "empty: there is no checkpoint to resume from; start the run without --resume" in err


def test_an_unfinished_run_is_not_overwritten(federation, capsys):
    federation.error = RuntimeError("a crash")
    with pytest.raises(RuntimeError):
        main(FIT.split())
    federation.error = None
    code, _, err = fdl(capsys, FIT)
    assert code == 2 and "unfinished run" in err and "--resume" in err
    assert fdl(capsys, f"{FIT} --resume")[0] == 0


def test_a_run_that_never_reached_a_checkpoint_is_begun_anew(federation, capsys):
    fdl(capsys, FIT)
    Path("runs/small/summary.json").unlink()
    for file in Path("runs/small/checkpoints").iterdir():
        file.unlink()
    assert fdl(capsys, FIT)[0] == 0


def test_a_damaged_stored_recipe_is_explained(federation, capsys):
    Path("runs/small").mkdir(parents=True)
    Path("runs/small/recipe.yaml").write_text("a: [")
    Path("runs/small", runs.CHECKPOINTS).mkdir()
    Path("runs/small", runs.CHECKPOINTS, CHECKPOINT).touch()
    code, _, err = fdl(capsys, FIT)
    assert code == 2 and "runs/small/recipe.yaml: cannot be read" in err
    assert fdl(capsys, f"{FIT} --overwrite")[0] == 0


def test_a_recipe_stored_before_a_key_existed_is_still_the_same(federation, capsys):
    fdl(capsys, FIT)
    path = Path("runs/small/recipe.yaml")
    path.write_text(path.read_text().replace("digest: null\n", ""))
    assert fdl(capsys, f"{FIT} --resume")[0] == 0


def test_a_folder_that_cannot_be_made(federation, capsys):
    Path("file").touch()
    code, _, err = fdl(capsys, f"{FIT} --output-dir file/below")
    assert code == 2 and "error: file/below: cannot be written: Not a directory" in err and federation.runs == []


def test_plugins_beside_the_recipe_are_found(federation, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    Path("cli_plugins.py").write_text("from fdl.methods.fedavg import FedAvg\nclass Mine(FedAvg):\n    pass\n")
    assert fdl(capsys, f"{FIT} method=cli_plugins.Mine")[0] == 0
    assert federation.runs[0][0].method.target == "cli_plugins.Mine"
    code, _, err = fdl(capsys, f"{FIT} method=cli_plugin.Mine")
    assert code == 2 and "there is no module 'cli_plugin'; did you mean 'cli_plugins'?" in err


def test_ctrl_c_says_how_to_go_on(federation, capsys):
    federation.error = KeyboardInterrupt()
    code, _, err = fdl(capsys, f"{FIT} --output-dir x specialists=[mlp]")
    assert code == 130
    assert err.splitlines()[-1] == (
        "  python -m fdl fit --recipe recipes/small.yaml --output-dir x 'specialists=[mlp]' --resume"
    )
    code, _, err = fdl(capsys, f"{FIT} --resume --output-dir x specialists=[mlp]")
    assert code == 130 and err.count("--resume") == 1


def test_ctrl_c_before_the_first_checkpoint(federation, capsys, monkeypatch):
    def interrupted(recipe, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fdl.build.federation"], "build_federation", interrupted)
    assert fdl(capsys, FIT) == (130, "", "interrupted\n")
    assert not Path("runs").exists()


def test_a_follower_of_another_process_touches_nothing(federation, capsys, monkeypatch):
    """Fabric starts the same command again for every further device; only the first one may prepare the folder."""
    fdl(capsys, FIT)
    Path("runs/small/summary.json").unlink()
    before = Path("runs/small/recipe.yaml").stat().st_mtime_ns
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fdl(capsys, FIT)[0] == 0
    assert Path("runs/small/recipe.yaml").stat().st_mtime_ns == before and not Path("runs/small/summary.json").exists()


# --- compare

COMPARE = "compare --recipe recipes/small.yaml"


def test_compare_runs_every_variant_and_seed(federation, capsys):
    code, out, _ = fdl(capsys, f"{COMPARE} federation.rounds=4")
    assert code == 0
    found = [
        (r.name, r.method.target, r.seed, r.federation.rounds, r.local_training.optimizer.args["lr"])
        for r, _ in federation.runs
    ]
    assert found == [
        ("small-fedavg-seed-0", "fedavg", 0, 4, 0.1),
        ("small-fedavg-seed-1", "fedavg", 1, 4, 0.1),
        ("small-slow-seed-0", "fedavg", 0, 4, 0.01),
        ("small-slow-seed-1", "fedavg", 1, 4, 0.01),
        ("small-centralized-seed-0", "centralized", 0, 4, 0.1),
        ("small-centralized-seed-1", "centralized", 1, 4, 0.1),
    ]
    assert Path("runs/small/compare/slow/seed-1/summary.json").is_file()
    for file in ("compare.csv", "compare.md"):
        assert "slow" in Path("runs/small/compare", file).read_text()
    assert "0.5500 ± 0.0707" in out  # mean and deviation of 0.5 and 0.6
    assert any(Path("runs/small/compare/tensorboard").rglob("events.out.tfevents.*"))


def test_compare_does_not_repeat_what_is_complete(federation, capsys):
    federation.error = KeyboardInterrupt()
    code, _, err = fdl(capsys, COMPARE)
    assert code == 130 and err.splitlines()[-1] == f"  python -m fdl {COMPARE}"
    federation.error = None
    fdl(capsys, COMPARE)
    assert [resume for _, resume in federation.runs[1:]] == [True, False, False, False, False, False]
    count = len(federation.runs)
    code, _, err = fdl(capsys, f"{COMPARE} --seeds 0,1,2 --methods slow")
    assert code == 0 and err.count("complete already") == 2
    assert [r.seed for r, _ in federation.runs[count:]] == [2]


def test_adding_a_variant_repeats_nothing(federation, capsys):
    fdl(capsys, COMPARE)
    count = len(federation.runs)
    path = Path("recipes/small.yaml")
    path.write_text(path.read_text() + "    prox: {method: fedprox}\n")
    fdl(capsys, COMPARE)
    assert [r.method.target for r, _ in federation.runs[count:]] == ["fedprox"] * 2


def test_compare_takes_methods_that_are_no_variants(federation, capsys):
    fdl(capsys, f"{COMPARE} --methods fedprox,slow --seeds 5")
    assert [(r.method.target, r.local_training.optimizer.args["lr"], r.seed) for r, _ in federation.runs] == [
        ("fedprox", 0.1, 5),
        ("fedavg", 0.01, 5),
    ]


def test_compare_of_several_recipes(federation, capsys):
    Path("recipes/other.yaml").write_text(RECIPE.partition("compare:")[0])
    code, out, _ = fdl(capsys, f"{COMPARE} --recipe recipes/other.yaml --seeds 0 --output-dir all")
    assert code == 0
    places = sorted(str(path.parent) for path in Path("all").rglob("summary.json"))
    assert places == [
        "all/other/fedavg/seed-0",
        "all/small/centralized/seed-0",
        "all/small/fedavg/seed-0",
        "all/small/slow/seed-0",
    ]
    assert "small/slow" in out and "other" in out


def test_compare_goes_on_after_a_run_that_fails_and_marks_it(federation, capsys):
    from fdl.errors import UserError

    def failing(recipe):
        if recipe.local_training.optimizer.args.get("lr") == 0.01 and recipe.seed == 1:
            return UserError("data: no samples")
        return ZeroDivisionError("a bug") if recipe.method.target == "centralized" else None

    federation.failing = failing
    code, out, err = fdl(capsys, COMPARE)
    assert code == 2 and len(federation.runs) == 6
    assert "error: 3 of 6 run(s) failed:\n  - slow, seed 1: data: no samples\n  - centralized, seed 0: ZeroDiv" in err
    with open("runs/small/compare/compare.csv", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert {name: (row["seeds"], row["failed"]) for name, row in rows.items()} == {
        "fedavg": ("2", ""),
        "slow": ("1", "seed 1: data: no samples"),
        "centralized": ("0", "seed 0: ZeroDivisionError: a bug; seed 1: ZeroDivisionError: a bug"),
    }
    assert float(rows["slow"]["student_last_mean"]) == 0.5 and rows["centralized"]["student_last_mean"] == ""
    text = Path("runs/small/compare/compare.md").read_text()
    assert "Failed: slow, seed 1: data: no samples" in out
    assert (
        "## Failed\n\n- slow: seed 1: data: no samples\n- centralized: seed 0: ZeroDivisionError: a bug; seed 1" in text
    )

    federation.failing, count = None, len(federation.runs)
    assert fdl(capsys, COMPARE)[0] == 0
    assert [(r.method.target, r.seed) for r, _ in federation.runs[count:]] == [
        ("fedavg", 1),
        ("centralized", 0),
        ("centralized", 1),
    ]
    assert "Failed" not in Path("runs/small/compare/compare.md").read_text()


def test_a_comparison_in_which_all_failed_says_so(federation, capsys):
    federation.failing = lambda recipe: ZeroDivisionError("a bug")
    code, out, _ = fdl(capsys, f"{COMPARE} --seeds 0")
    assert code == 2 and "Failed: fedavg, seed 0: ZeroDivisionError: a bug" in out
    assert "- fedavg: seed 0: ZeroDivisionError: a bug" in Path("runs/small/compare/compare.md").read_text()


def test_a_comparison_is_not_written_among_other_files(federation, capsys):
    Path("mine").mkdir()
    Path("mine/compare.csv").write_text("by hand")
    code, _, err = fdl(capsys, f"{COMPARE} --output-dir mine")
    assert code == 2 and "mine: is no empty folder" in err and "compare.csv" in err
    assert files_of("mine") == {"compare.csv": b"by hand"} and federation.runs == []


def test_compare_of_a_changed_recipe_is_refused(federation, capsys):
    fdl(capsys, COMPARE)
    code, _, err = fdl(capsys, f"{COMPARE} local_training.batch_size=8")
    assert code == 2 and "fedavg, seed 0" in err and "local_training.batch_size: 32 there, 8 here" in err
    count = len(federation.runs)
    assert fdl(capsys, f"{COMPARE} local_training.batch_size=8 --overwrite")[0] == 0
    assert fdl(capsys, f"{COMPARE} local_training.batch_size=8 --overwrite")[0] == 0  # all complete by now
    assert [r.local_training.batch_size for r, _ in federation.runs[count:]] == [8] * 6


# --- check


def test_check_builds_and_trains_nothing(here, capsys):
    code, out, err = fdl(capsys, "check --recipe recipes/small.yaml")
    assert code == 0
    assert err.splitlines() == [
        "reading the data and building the models",
        "counting the bytes of two rounds of 3 untrained clients, with 400 public samples",
    ]
    assert "alpha: 0.5" in out  # the resolved recipe
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] == ["student"]]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    assert all(row[2] == f"{parameters:,}" for row in rows)
    train, held_out = ([int(row[i].replace(",", "")) for row in rows] for i in (3, 4))
    assert sum(train) + sum(held_out) == 1797 - 400 - 100 - 360
    assert [sum(map(int, row[-10:])) for row in rows] == train
    facts = dict(line.split(None, 1) for line in out.splitlines() if len(line.split()) > 1)
    assert facts["student"] == f"{parameters} parameters"
    assert facts["proxy"] == "400 samples" and facts["test"] == "360 samples"
    assert re.search(r"a round of all clients sends 7\.\d kB down and 7\.\d kB up", out)
    assert sorted(path.name for path in here.iterdir()) == ["recipes"]
