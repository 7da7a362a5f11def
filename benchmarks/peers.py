"""The same two jobs in fdl, in a bare PyTorch loop, in pfl-research and in Flower: round times and memory.

    python benchmarks/peers.py [--jobs digits cifar10] [--cifar FILE.npz] [--repeats 5] [--rounds 50]
        [--pfl-python PYTHON] [--flower-python PYTHON] [--output FILE.md]

digits: scikit-learn's digits, a perceptron of 17 thousand parameters. cifar10: 5,000 photographs of FILE (x_train,
y_train, x_test, y_test), a convolutional network of 62 thousand. Both with 10 of 10 and with 10 of 50 clients, IID,
FedAvg, one local epoch of batches of 32, SGD 0.1, an evaluation every round, one CPU thread a process.

Other systems have their own pins, so each may live in an environment of its own, whose interpreter is given; without it
they are skipped, and the table says so. Every run is a process of its own; systems take turns. Equal work is asserted:
all train the same number of clients in the same number of steps (where a system draws other cohorts, these differ in
size by single samples), and all models have learnt. A round's time is the median over all rounds but the first two,
which pay for starting up; the first round's time is told apart. Peaks are of the main process alone: Flower's workers
and fdl's second rank have memory of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).with_name("peers")
COHORT, CLIENTS = 10, (10, 50)
MODELS = {"digits": "mlp", "cifar10": "cnn"}
WARM = 2


def arrays(job: str, file: Path | None) -> dict[str, np.ndarray]:
    """Inputs as float32 [n, …], digits in 0 … 1 and photographs standardised by channel, and labels, shuffled."""
    if job == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, test = (x.reshape(-1, 1, 8, 8) / 16).astype(np.float32), 360
    else:
        with np.load(file) as given:
            x, y = (np.concatenate([given[f"{k}_train"], given[f"{k}_test"]]) for k in ("x", "y"))
        x, test = x, 1000
    order = np.random.default_rng(0).permutation(len(y))[: 6000 if job == "cifar10" else None]
    x, y = x[order], y[order].astype(np.int64)
    if job == "cifar10":
        x = (x / 255).astype(np.float32)
        # else the network stays on the plateau where it begins for longer than the job lasts
        x = (x - x[test:].mean((0, 1, 2))) / x[test:].std((0, 1, 2))
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return {"x_train": x[test:], "y_train": y[test:], "x_test": x[:test], "y_test": y[:test]}


def shared_out(data: dict[str, np.ndarray], clients: int) -> np.ndarray:
    """Which client has each training image: equal shares but for one image."""
    return np.arange(len(data["y_train"])) % clients


def systems(options: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """Interpreter and script of each system that can be run, with what follows the job's own arguments."""
    own = {
        "bare PyTorch": (sys.executable, ["bare_job.py"]),
        "fdl, sequential": (sys.executable, ["fdl_job.py", "sequential", "1"]),
        "fdl, batched": (sys.executable, ["fdl_job.py", "vectorized", "1"]),
        "fdl, 2 ranks": (sys.executable, ["fdl_job.py", "sequential", "2"]),
    }
    others = {"pfl-research": (options.pfl_python, "pfl_job.py"), "Flower": (options.flower_python, "flower_job.py")}
    return own | {name: (python, [script]) for name, (python, script) in others.items() if python}


def run(python: str, script: Sequence[str], job: Path, model: str, rounds: int) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [python, str(FOLDER / script[0]), str(job), model, str(COHORT), str(rounds), *script[1:]]
    paths = os.pathsep.join(path for path in (str(FOLDER), os.environ.get("PYTHONPATH")) if path)
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def assert_equal_work(found: dict[str, list[dict[str, Any]]], rounds: int) -> None:
    """The same steps everywhere, and models that have learnt."""
    steps = {system: {one["steps"] for one in some} for system, some in found.items()}
    expected = next(iter(steps["bare PyTorch"]))
    for system, counts in steps.items():
        assert all(abs(count - expected) <= 0.02 * expected for count in counts), f"{system}: {counts}, not {expected}"
    for system, some in found.items():
        assert all(len(one["times"]) == rounds + 1 for one in some), f"{system}: rounds are missing"
        assert min(one["accuracy"] for one in some) > 0.12, f"{system}: the model has not learnt"


def rows_of(job: str, clients: int, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over repeats, ratios to the bare loop of the same repeat."""
    bare = [_round(one) for one in found["bare PyTorch"]]
    rows = []
    for system, some in found.items():
        times = [_round(one) for one in some]
        rows.append(
            {
                "job": f"{job}, {COHORT} of {clients}",
                "system": system,
                "ms": [1000 * time for time in times],
                "ratio": [time / reference for time, reference in zip(times, bare)],
                "first": statistics.median(one["times"][1] - one["times"][0] for one in some),
                "peak": statistics.median(one["peak"] for one in some),
                "accuracy": statistics.median(one["accuracy"] for one in some),
            }
        )
    return rows


def _round(one: dict[str, Any]) -> float:
    return statistics.median([b - a for a, b in pairwise(one["times"])][WARM:])


def markdown(rows: Sequence[dict[str, Any]], skipped: Sequence[str]) -> str:
    """The table for people."""

    def spread(values: Sequence[float], digits: int) -> str:
        return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}–{max(values):.{digits}f}]"

    lines = [
        "| job | system | ms a round, median [min–max] | ratio to bare | first round, s | peak MB, main process "
        "| test accuracy |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['job']} | {row['system']} | {spread(row['ms'], 1)} | {spread(row['ratio'], 2)} "
            f"| {row['first']:.2f} | {row['peak'] / 1e6:.0f} | {row['accuracy']:.3f} |"
        )
    return "\n".join([*lines, *(["", *skipped] if skipped else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=list(MODELS), default=["digits"])
    parser.add_argument("--cifar", type=Path, help="the photographs, for cifar10")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--pfl-python", help="interpreter of an environment that has pfl 0.6")
    parser.add_argument("--flower-python", help="interpreter of an environment that has flwr 1.42 and Ray")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(argv)
    if "cifar10" in options.jobs and options.cifar is None:
        parser.error("cifar10 needs --cifar FILE.npz")
    if options.rounds <= WARM:
        parser.error(f"--rounds must be more than {WARM}, of which nothing is told")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for job in options.jobs:
            data = arrays(job, options.cifar)
            for clients in options.clients:
                file = Path(name) / f"{job}-{clients}.npz"
                np.savez(file, **data, share=shared_out(data, clients))
                found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems(options)}
                for _ in range(options.repeats):
                    for system, (python, script) in systems(options).items():
                        found[system].append(run(python, script, file, MODELS[job], options.rounds))
                        print(
                            f"{job}, {clients} clients, {system}: {1000 * _round(found[system][-1]):.1f} ms", flush=True
                        )
                assert_equal_work(found, options.rounds)
                rows += rows_of(job, clients, found)
                if options.output:  # what is done is done, should a later job fail
                    options.output.write_text(markdown(rows, ()) + "\n", encoding="utf-8")
    missing = {"pfl-research": options.pfl_python, "Flower": options.flower_python}
    skipped = [
        f"{system} was not run: no interpreter that has it was given." for system, at in missing.items() if not at
    ]
    table = markdown(rows, skipped)
    print(table)
    if options.output:
        options.output.write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
