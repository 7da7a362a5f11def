"""docs/security.md, docs/scale.md and benchmarks/README.md name what is there, and all of it where they list a kind."""

import importlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from fdl.cli.main import _parse
from fdl.engine.distributed.launcher import GRACE
from fdl.engine.vectorized.stacked_models import SMALL
from fdl.federation.scheduling import SLACK
from fdl.recipe import Recipe, load
from fdl.recipe.validate import keys
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names
from fdl.runs.run_keys import RESUMABLE_KEYS
from fdl.utils.stopwatch import PARTS

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("docs/security.md", "docs/scale.md")}
PAGES["benchmarks/README.md"] = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
PAGES["SECURITY.md"] = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SECURITY, SCALE, BENCHMARKS = (PAGES[name] for name in ("docs/security.md", "docs/scale.md", "benchmarks/README.md"))

KEYS = {path for path, *_ in keys(Recipe)}
COMMANDS = {  # those that are complete, not those that are only named
    line.partition("  #")[0].removesuffix(" &")
    for text in PAGES.values()
    for line in re.findall(r"-m fdl ([^`\n]+)", text)
    if "…" not in line and "--" in line
}
SCRIPTS = re.findall(r"^    python (benchmarks/\w+\.py)(.*)$", BENCHMARKS, re.M)


def spans(text):
    """What stands in backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def section(text, title):
    return re.split(r"^## ", text.split(f"## {title}\n", 1)[1], flags=re.M)[0]


def names(kind):
    return set(short_names(KINDS[kind]))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text = PAGES[page]
    named = set(re.findall(r"\b((?:fdl|recipes|benchmarks|tests|docs)/[\w/]+\.(?:py|yaml|md))", text))
    linked = re.findall(r"\]\(([^)#]+)\)", text)
    assert named or linked
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
    assert [path for path in linked if not (ROOT / page).parent.joinpath(path).is_file()] == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_one_that_fdl_knows(command):
    options, overrides = _parse(shlex.split(command))
    recipes = getattr(options, "recipe", None)
    for recipe in [recipes] if isinstance(recipes, str) else recipes or ():
        load(ROOT / recipe, overrides)


def test_commands_were_found():
    assert {command.split()[0] for command in COMMANDS} == {"fit", "compare", "audit"}


@pytest.mark.parametrize("page", ["docs/security.md", "docs/scale.md", "benchmarks/README.md"])
def test_every_key_is_one_of_a_recipe(page):
    top = {key.partition(".")[0] for key in KEYS}
    dotted = {span.split(":")[0].split("=")[0] for span in spans(PAGES[page])}
    dotted = {key for key in dotted if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key) and key.partition(".")[0] in top}
    dotted = {key for key in dotted if not key.endswith((".py", ".txt"))}
    free = {"method.args.robust"}  # an argument of plug-ins, which the schema does not know
    assert dotted and dotted - free <= KEYS, dotted - free - KEYS


def test_every_piece_of_a_recipe_has_keys_of_one():
    pieces = re.findall(r"^```yaml\n(.*?)^```", SECURITY + SCALE, re.M | re.S)
    pieces += [s for s in spans(SECURITY + SCALE) if re.match(r"(privacy|fabric|federation|callbacks): [\[{]", s)]
    assert len(pieces) >= 3
    for piece in pieces:
        for section_, values in yaml.safe_load(piece).items():
            assert section_ in KEYS, section_
            if isinstance(values, dict):
                assert {f"{section_}.{key}" for key in values} <= KEYS, piece


def test_security_has_a_row_for_every_method():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section(SECURITY, "Disclosure per method"), re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(names("method"))


def test_security_names_every_adversary_rule_attack_and_release():
    liars = section(SECURITY, "Byzantine clients")
    table = {name for row in re.findall(r"^\| (`[^|]+) \|", liars, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert table - {"robust"} == names("robust_rule")
    said = set(re.findall(r"`(\w+)`", liars.partition("They are simulations")[0]))
    assert said - {"adversaries"} == names("adversary")
    assert names("attack") <= set(spans(section(SECURITY, "Disclosure per method")))
    assert {"noisy_responses", "noisy_votes"} == names("private_release") and "noisy_prototypes" in names(
        "prototype_transfer"
    )
    confident = section(SECURITY, "Disclosure per method").split("**Confidence")[1]
    assert {"density", "domain_classifier", "validation", "sample_count", "entropy", "margin"} <= names("confidence")
    assert {"density", "domain_classifier", "validation", "sample_count"} <= set(re.findall(r"`(\w+)`", confident))


def test_robust_is_said_to_be_for_those_methods_that_take_it():
    sentence = re.search(r"Robust rules are for (.*?);", SECURITY, re.S).group(1)
    taking = set()
    for name, path in short_names(KINDS["method"]).items():
        file = Path(importlib.util.find_spec(path.rpartition(".")[0]).origin)
        if re.search(r"\brobust: RobustRule", file.read_text(encoding="utf-8")):
            taking.add(name)
    assert set(re.findall(r"`(\w+)`", sentence)) == taking


EVERY_PAGE = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])


def test_lines_of_python_that_pages_give_run(tmp_path):
    lines = [
        code
        for page in EVERY_PAGE
        for code in re.findall(r'python -c "(from fdl[^"]+)"', page.read_text(encoding="utf-8"))
    ]
    assert lines
    for code in lines:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}: {done.stderr[-500:]}"
    assert any(tmp_path.iterdir())  # each of today's writes a file


def test_what_pages_import_exists():
    found = {
        (module, name)
        for page in EVERY_PAGE
        for module, names in re.findall(r"from (fdl[\w.]*) import (\w+(?:, \w+)*)", page.read_text(encoding="utf-8"))
        for name in names.split(", ")
    }
    assert found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_modules_that_are_named_exist():
    for dotted in {span for span in spans(SECURITY + SCALE) if re.fullmatch(r"fdl(\.\w+)+", span)}:
        assert importlib.util.find_spec(dotted), dotted


def test_scale_says_the_numbers_of_the_code():
    assert f"{SMALL['cpu']:,}" in SCALE and f"{SMALL['cuda']:,}" in SCALE
    assert f"{SLACK:g} times" in SCALE and GRACE == 10 and "ten seconds" in SCALE
    parts = section(SCALE, "Time profile").partition("With several ranks")[0]
    assert set(PARTS) <= set(re.findall(r"`(\w+)`", parts))
    resumed = re.search(r"`fabric\.devices`, (.*?) may differ", SCALE, re.S).group(0)
    for key in re.findall(r"`([\w.]+)`", resumed):
        assert key in RESUMABLE_KEYS, key


def test_the_batch_script_asks_for_as_many_tasks_as_the_recipe_for_devices():
    script = next(block for block in re.findall(r"^```bash\n(.*?)^```", SCALE, re.M | re.S) if "#SBATCH" in block)
    for asked, key in ((r"--ntasks-per-node=(\d+)", "devices"), (r"--nodes=(\d+)", "num_nodes")):
        assert re.search(asked, script).group(1) == re.search(rf"fabric\.{key}=(\d+)", script).group(1)
    for line in re.findall(r"^torchrun .* -m fdl .*$", SCALE, re.M):
        assert re.search(r"--nproc_per_node=(\d+)", line).group(1) == re.search(r"fabric\.devices=(\d+)", line).group(1)


def test_the_script_for_time_limits_hands_the_signal_on_and_requeues_the_job(tmp_path):
    """With stand-ins for fdl and Slurm: a first start, a signal, the requeued job's start, and one that fails."""
    script = next(block for block in re.findall(r"^```bash\n(.*?)^```", SCALE, re.M | re.S) if "--requeue" in block)
    (tmp_path / "job.sh").write_text(script)
    tools = {
        "python": """
            echo "$@" >> calls
            if [ "${FAIL:-}" ]; then exit 2; fi
            mkdir -p runs/quickstart/checkpoints && touch runs/quickstart/checkpoints/round-000001-0.safetensors
            trap "sleep 0.2; exit 138" USR1
            sleep 0.2; touch ready; for _ in $(seq 600); do sleep 0.05; done
        """,
        "scontrol": 'echo "scontrol $@" >> calls',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{textwrap.dedent(text)}")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    def job(warned, **more):
        (tmp_path / "ready").unlink(missing_ok=True)
        process = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env={**environment, **more})
        while warned and not (tmp_path / "ready").exists():
            time.sleep(0.01)
        if warned:
            process.send_signal(signal.SIGUSR1)
        return process.wait(60)

    assert [job(True), job(True), job(False, FAIL="1")] == [138, 138, 2]
    fit = "-m fdl fit --recipe recipes/quickstart.yaml"
    expected = [fit, "scontrol requeue 7", f"{fit} --resume", "scontrol requeue 7", f"{fit} --resume"]
    assert (tmp_path / "calls").read_text().splitlines() == expected


def test_every_benchmark_is_described_with_options_that_it_has():
    there = {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    assert {script for script, _ in SCRIPTS} == there
    titles = re.findall(r"^### (\S+\.py)$", BENCHMARKS, re.M)
    assert sorted(titles) == sorted(Path(path).name for path in there)
    for script, arguments in SCRIPTS:
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"(--[\w-]+)", arguments):
            assert f'add_argument("{option}"' in source, f"{script} {option}"
