"""What the README tells people to type works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from lightning import LightningModule

from fdl.__main__ import main

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip() and not line.startswith("#")]

FDL = re.compile(r"(?:\S*python3?) -m fdl (?P<arguments>.*)")
SCRIPT = re.compile(r"(?:\S*python3?) (?P<script>benchmarks/\S+\.py)")

SHORT = [
    "federation.rounds=1",
    "local_training.steps=2",
    "server_distil.steps=2",
    "client_distil.steps=2",
    "evaluation.metrics=[accuracy]",
    "callbacks=[csv]",
]
"""What makes a training of the README a matter of seconds."""


def commands(pattern: re.Pattern) -> list[str]:
    """The parts of the README's lines that match."""
    parts = [part.strip() for line in LINES for part in line.split("&&")]
    return [match.group(1) for part in parts if (match := pattern.fullmatch(part.partition("  #")[0].strip()))]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


def test_the_first_block_installs_and_runs_on_one_line_each():
    install, test = BLOCKS[0].splitlines()
    venv = "python3 -m venv .venv && .venv/bin/pip install -q -e"
    assert install == f"{venv} . && .venv/bin/python -m fdl fit --recipe recipes/quickstart.yaml"
    assert test == f'{venv} ".[dev]" && .venv/bin/python -m pytest -n 2'


def test_every_command_of_fdl_runs(tmp_path, capsys, monkeypatch):
    found = commands(FDL)
    assert {shlex.split(line)[0] for line in found} == {"fit", "check", "compare", "export", "audit", "list"}
    monkeypatch.chdir(ROOT)
    for number, line in enumerate(found):
        arguments = shlex.split(line)
        if "--output-dir" in arguments:
            position = arguments.index("--output-dir") + 1
            arguments[position] = str(tmp_path / arguments[position])
        elif "--run" in arguments:
            position = arguments.index("--run") + 1
            arguments[position] = str(tmp_path / arguments[position])
        elif arguments[0] != "list":
            arguments.append(f"output_dir={tmp_path / 'runs'}")
        if arguments[0] in ("fit", "compare"):
            arguments += SHORT
        if number == 0:  # one as people start it; the others in this process, which spares the imports
            done = run(["-m", "fdl", *arguments])
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code = main(arguments)
            out, err = capsys.readouterr()
        assert code == 0, f"{line}\n{err}"
        assert out.strip(), line
    assert (tmp_path / "runs" / "quickstart" / "summary.json").is_file()


def test_the_lines_of_python_run(tmp_path, capsys, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(ROOT)
    changes = "".join(f', "{change}"' for change in SHORT)
    code = code.replace('"seed=1"]', f'"seed=1"{changes}]').replace('"runs/mine"', repr(str(tmp_path / "mine")))
    names: dict = {}
    exec(code, names)
    assert isinstance(names["student"], LightningModule)
    assert capsys.readouterr().out.startswith("Run(")


def test_every_benchmark_knows_its_options():
    for script in commands(SCRIPT):
        done = run([script, "--help"])
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        assert "usage" in done.stdout


def test_every_file_that_is_named_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:fdl|recipes|benchmarks|tests)/[\w/]+\.(?:py|yaml))", text))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
