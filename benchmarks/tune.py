"""Settings of the methods in methods.yaml, compared with an equal budget of trials on a seed that no table reports.

    python benchmarks/tune.py [--only METHOD …] [--seed 10] [--data cifar10] [--file FILE.npz] [--quick] [--output DIR]

What is tried is in benchmarks/tune.yaml: as many settings for every method, the first of which is the table's. Each is
run once, with the seed given, on the job of benchmarks/methods.py, whose checks for equal work hold here, too. The best
is the one whose student does best on the server's validation samples after the last round, which is what the table
reports, and of equals the likeliest; test samples are looked at by nobody. A method that is not named there (fedavg,
say) has no setting of its own: its clients' training is the same for all.

DIR, by default runs/tune-<data>, gets tune.md and tune.csv, a line a trial, and the runs; those that are complete are
not run again. The winners go into methods.yaml by hand, with a comment that names seed and budget.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from fdl.recipe import load
from fdl.runs import run as runs
from fdl.runs.compare import PlannedRun

SPACE = Path(__file__).with_name("tune.yaml")
REPORTED = (0, 1, 2)
"""Seeds of the tables, on which nothing is chosen."""


def neighbour(name: str) -> ModuleType:
    """Another script of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


methods = neighbour("methods")


def space(only: Sequence[str] | None = None) -> dict[str, list[list[str]]]:
    """Every method's trials, of which all have as many.

    Raises:
        SystemExit: a method is not there, or has more or fewer trials than the others.
    """
    trials = yaml.safe_load(SPACE.read_text(encoding="utf-8"))["methods"]
    if len({len(settings) for settings in trials.values()}) > 1:
        raise SystemExit(f"{SPACE.name}: methods have budgets of {sorted({len(s) for s in trials.values()})} trials")
    unknown = sorted(set(only or ()) - set(trials))
    if unknown:
        raise SystemExit(f"{SPACE.name} has no trials for {', '.join(unknown)}; there are {', '.join(trials)}")
    return {name: trials[name] for name in only or trials}


def planned(
    trials: Mapping[str, Sequence[Sequence[str]]], changes: Sequence[str], seed: int, folder: Path
) -> list[tuple[PlannedRun, int, list[str]]]:
    """One run for each trial, with its number and its overrides."""
    variants = load(methods.RECIPE, changes).compare.variants
    return [
        (
            methods.at_once(
                PlannedRun(name, seed, load(methods.RECIPE, [*changes, f"seed={seed}", *trial], variants[name]), place)
            ),
            number,
            list(trial),
        )
        for name, settings in trials.items()
        for number, trial in enumerate(settings)
        for place in [folder / name / f"trial-{number}"]
    ]


def score(folder: Path) -> dict[str, Any]:
    """How a finished trial did on validation data after the last round."""
    metrics = runs.read_summary(folder)["metrics"]
    return {key: metrics[f"student/validation/{key}"] for key in ("accuracy", "nll")}


def tabulate(plan: Sequence[tuple[PlannedRun, int, list[str]]]) -> list[dict[str, Any]]:
    """A line for each trial; the best of every method is marked."""
    table = [
        {
            "method": run.variant,
            "trial": number,
            "settings": " ".join(trial) or "as in methods.yaml",
            **score(run.folder),
        }
        for run, number, trial in plan
    ]
    for name in dict.fromkeys(line["method"] for line in table):
        mine = [line for line in table if line["method"] == name]
        winner = max(mine, key=lambda line: (line["accuracy"], -line["nll"], -line["trial"]))
        for line in mine:
            line["best"] = line is winner
    return table


def markdown(table: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
    """The table for people."""
    lines = [
        f"Seed {seed}, one run a trial; validation data, after the last round.",
        "",
        "| method | settings | accuracy | NLL | best |",
        "|---|---|---:|---:|---|",
    ]
    for line in table:
        mark = "yes" if line["best"] else ""
        cells = line["method"], f"`{line['settings']}`", f"{line['accuracy']:.3f}", f"{line['nll']:.3f}", mark
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run every trial, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods of tune.yaml")
    parser.add_argument("--seed", type=int, default=10, help="of no table")
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--file", type=Path, help="the images, for cifar10")
    parser.add_argument("--quick", action="store_true", help="few clients, rounds and steps: tells nothing, tests all")
    parser.add_argument("--output", type=Path, help="default runs/tune-<data>")
    options = parser.parse_args(argv)
    if options.seed in REPORTED:
        raise SystemExit(f"--seed {options.seed}: the tables report it, so nothing may be chosen on it; take another")
    folder = options.output or Path("runs") / f"tune-{options.data}"
    changes = methods.overrides(options.data, options.file, options.quick)
    changes += ["callbacks=[]", "evaluation.specialists=false"]
    plan = planned(space(options.only), changes, options.seed, folder)
    methods.assert_equal_work([run for run, _, _ in plan])
    for place, (run, number, trial) in enumerate(plan, 1):
        print(f"{place} of {len(plan)}: {run.variant}, trial {number} {' '.join(trial)}", flush=True)
        if not runs.is_complete(run.recipe, run.folder):
            methods.carry_out(run)
    table = tabulate(plan)
    lines = markdown(table, options.seed)
    (folder / "tune.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open(folder / "tune.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
