"""All methods on one split with the same local work: quality, bytes, rounds, time and memory in one table.

    python benchmarks/methods.py [KEY=VALUE …] [--data cifar10] [--file FILE.npz] [--seeds 0 1 2] [--only A B] [--quick]
        [--output D]

The job: benchmarks/methods.yaml, digits or photographs, non-IID clients (Dirichlet, alpha 0.1). Equal work is asserted
before anything runs: in each seed every method has the same data, the same shares, the same student, the same local
training, and the same number of local and of server steps over all rounds. `distillation` and `one_shot` take theirs in
a single round. How a method learns from answers, and in which code it sends what, is its own, chosen as the comments in
methods.yaml say. What its clients train on top, e.g. digesting what comes back, is in the last column.

A method's quality is the test accuracy of its student after the last round; where there is no student, that of the
clients' own models, on the same test data. KTE is its share of centralised training's. That of the best round on
validation data, which takes labels that a server hardly has, stands beside it. Bytes are those of encoded messages up
and down, all clients, of all rounds; sets sent before round 1 are apart. The target is nine tenths of centralised
training's accuracy; for all methods alike it is reached in the first round whose own accuracy is, without a mean over
rounds, which methods of a single round (marked as such) do not have. Every run has a process of its own: its peak
memory, interpreter and libraries included, is its own.

D gets methods.md and methods.csv (the table), methods.png, the runs themselves, and tensorboard/ with the same
figure, curves by round and by bytes, and hyperparameters. Runs that are complete in D are not run again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fdl.recipe import difference
from fdl.runs import run as runs
from fdl.runs.compare import PlannedRun, plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = Path(__file__).with_name("methods.yaml")
CENTRAL, FEDAVG, CODED = "centralized", "fedavg", "fedavg_coded"
AT_ONCE = ("distillation", "one_shot")
PARTS = ("local_training", "server_distil")
MAY_DIFFER = (
    *("method", "channel", "name", "specialists", "teacher"),
    *("federation.rounds", "local_training.steps", "server_distil.steps"),  # their products must be equal
    # how answers are learnt from is each method's own: its learning rates, and what its clients digest on top
    *("client_distil", "server_distil.optimizer", "server_distil.scheduler", "server_distil.gradient_clip"),
)
OWN_OPTIMIZER = ("scaffold",)
"""Variants whose local training cannot take the others' optimiser; steps and batches are the same."""
QUICK = [
    "federation.rounds=3",
    "federation.clients=3",
    "local_training.steps=10",
    "client_distil.steps=5",
    "server_distil.steps=20",
]
FEW = [CENTRAL, "single_site", FEDAVG, "federated_distillation", "one_shot", "fedgkt"]
AVERAGED = (
    *("accuracy", "accuracy_best", "kte", "specialists"),  # with a deviation, too
    *("bytes", "setup_bytes", "best_round", "seconds", "peak_bytes"),
)
SHARE = 0.9
WINDOW = 1
"""Rounds whose mean must reach the target: the same for all, and methods of a single round have no more."""


def neighbour(name: str) -> ModuleType:
    """Another script of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def overrides(data: str, file: Path | None, quick: bool) -> list[str]:
    """What the arguments change in the recipe: the job of communication.py, with labelled public samples."""
    communication = neighbour("communication")
    changes = communication.overrides(data, file, False)
    if data == "cifar10":
        # by place: an override of the whole list would win over those of variants with several sizes
        changes[changes.index(f"specialists=[{communication.CNN}]")] = f"specialists.0={communication.CNN}"
        sizes = f"[{communication.CNN}, {{target: cnn, args: {{channels: [32, 64, 64]}}}}]"
        pools = [f"compare.variants.codistillation_{mode}.specialists={sizes}" for mode in ("merged", "periodic")]
        changes += ["data.args.public=500", "server_distil.steps=100", *pools]
    return [*changes, *(QUICK if quick else ())]


def at_once(run: PlannedRun) -> PlannedRun:
    """A method of one round takes all steps in it."""
    recipe = run.recipe
    if run.variant not in AT_ONCE:
        return run
    rounds = recipe.federation.rounds
    longer = {part: replace(getattr(recipe, part), steps=rounds * getattr(recipe, part).steps) for part in PARTS}
    return run._replace(recipe=replace(recipe, federation=replace(recipe.federation, rounds=1), **longer))


def assert_equal_work(planned: Sequence[PlannedRun]) -> None:
    """Same recipe but for the method's own, same steps in all; and, once built, same shares of the same data."""
    from fdl.build import build

    for run in planned:
        first = next(other.recipe for other in planned if other.seed == run.seed)
        may_differ = (*MAY_DIFFER, *(["local_training.optimizer"] if run.variant in OWN_OPTIMIZER else []))
        changed = [
            key
            for key in difference(first.to_dict(), run.recipe.to_dict())
            if not any(f"{key}.".startswith(f"{allowed}.") for allowed in may_differ)
        ]
        assert not changed, f"{run.variant} differs in {changed}"
        for part in PARTS:
            mine, theirs = (r.federation.rounds * getattr(r, part).steps for r in (run.recipe, first))
            assert mine == theirs, f"{run.variant} takes {mine} {part} steps, others {theirs}"
        assert run.recipe.specialists[0].args == run.recipe.student.args, f"{run.variant}: clients have another model"
    seed = planned[0].seed
    prints = {run.variant: build(run.recipe, run.folder).fingerprint for run in planned if run.seed == seed}
    assert len(set(prints.values())) == 1, f"methods have different data: {prints}"


def carry_out(run: PlannedRun) -> None:
    """Run in a process of its own, forked from one that has nothing but the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fdl.build.federation"])
    process = context.Process(target=runs.run_recipe, args=(run.recipe, run.folder, runs.has_checkpoint(run.folder)))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{run.variant}, seed {run.seed}: failed, see above")


def measure(run: PlannedRun, central: dict[int, float]) -> dict[str, Any]:
    """What one run came to.

    Args:
        run: done.
        central: by seed, the accuracy of centralised training.
    """
    from fdl.metrics.federation import metric_by_round, rounds_to_target

    summary = runs.read_summary(run.folder)
    best, last = summary["best"], summary["metrics"]
    own = "student/test/accuracy" in best["metrics"]
    key = "student/test/accuracy" if own else "specialists/test/accuracy"
    sent = summary["communication"]
    history = {round: score for round, score in metric_by_round(summary["history"], key).items() if round > 0}
    extra = {k.partition("/")[0] for r in summary["history"] for m in r["clients"].values() for k in m if "loss" in k}
    return {
        "answers": "student" if own else "clients",
        "accuracy": last[key],
        "accuracy_best": best["metrics"][key] if own else None,
        "kte": last[key] / central[run.seed],
        "specialists": last.get("specialists/test/accuracy"),
        "bytes": sent["upload_bytes"] + sent["download_bytes"],
        "setup_bytes": sent["setup_bytes"],
        "best_round": best["round"],
        "rounds": summary["rounds"],
        "to_target": rounds_to_target(history, SHARE * central[run.seed], WINDOW),
        "seconds": summary["time"]["total_s"],
        "peak_bytes": summary["memory"]["peak_rss_bytes"],
        "also": " ".join(sorted(extra - {"fit", "test", "held_out"})),
    }


def tabulate(planned: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """A row a method: means over seeds, and deviations where they say something."""
    central = {run.seed: _accuracy(run) for run in planned if run.variant == CENTRAL}
    table = []
    for method in dict.fromkeys(run.variant for run in planned):
        measured = [measure(run, central) for run in planned if run.variant == method]
        line: dict[str, Any] = {"method": method, "seeds": len(measured), "answers": measured[0]["answers"]}
        for key in AVERAGED:
            values = [m[key] for m in measured if m[key] is not None]
            line[key] = statistics.fmean(values) if values else None
            if key in AVERAGED[:4]:
                line[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        reached = [m["to_target"] for m in measured if m["to_target"] is not None]
        line["to_target"] = statistics.fmean(reached) if len(reached) == len(measured) else None
        line["reached"], line["rounds"], line["also"] = len(reached), measured[0]["rounds"], measured[0]["also"]
        table.append(line)
    return table


def _accuracy(run: PlannedRun) -> float:
    return runs.read_summary(run.folder)["metrics"]["student/test/accuracy"]


def markdown(table: Sequence[dict[str, Any]], title: str) -> list[str]:
    """The table for people."""
    lines = [
        title,
        "",
        "| method | predictions by | test accuracy | KTE | mean client | MB | % of FedAvg | % of coded FedAvg "
        "| MB before | best round | accuracy there | rounds to target | seconds | peak MB | clients also train |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    base, coded = (next((m["bytes"] for m in table if m["method"] == name), 0) for name in (FEDAVG, CODED))
    for line in table:
        spread = {k: "" if line[f"{k}_std"] is None else f" ± {line[f'{k}_std']:.3f}" for k in AVERAGED[:3]}
        target = f"{line['to_target']:.1f}" if line["to_target"] is not None else f"> {line['rounds']}"
        partly = f" ({line['reached']} of {line['seeds']})" if 0 < line["reached"] < line["seeds"] else ""
        partly += ", single round" if line["rounds"] == 1 else ""
        cells = [
            line["method"],
            line["answers"],
            f"{line['accuracy']:.3f}{spread['accuracy']}",
            f"{line['kte']:.3f}{spread['kte']}",
            "" if line["specialists"] is None else f"{line['specialists']:.3f}",
            f"{line['bytes'] / 1e6:.3f}",
            f"{100 * line['bytes'] / base:.1f}" if base else "",
            f"{100 * line['bytes'] / coded:.1f}" if coded else "",
            f"{line['setup_bytes'] / 1e6:.3f}",
            "" if line["accuracy_best"] is None else f"{line['best_round']:.1f}",
            "" if line["accuracy_best"] is None else f"{line['accuracy_best']:.3f}{spread['accuracy_best']}",
            f"{target}{partly}",
            f"{line['seconds']:.1f}",
            f"{line['peak_bytes'] / 1e6:.0f}",
            line["also"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = "Mean ± standard deviation over seeds, last round; what the columns mean: benchmarks/methods.py."
    return [*lines, "", note, ""]


def figure(table: Sequence[dict[str, Any]], title: str) -> Figure:
    """Accuracy of every method, and accuracy over bytes."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    drawn = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    left, right = drawn.subplots(1, 2)
    ranked = sorted(table, key=lambda line: line["accuracy"])
    colours = {line["method"]: f"C{number % 10}" for number, line in enumerate(table)}
    left.barh(
        [line["method"] for line in ranked],
        [line["accuracy"] for line in ranked],
        xerr=[line["accuracy_std"] or 0.0 for line in ranked],
        color=[colours[line["method"]] for line in ranked],
    )
    left.set(xlabel="test accuracy", title=title)
    for line in table:
        if line["bytes"]:
            place, colour = (line["bytes"], line["accuracy"]), colours[line["method"]]
            right.errorbar(*place, line["accuracy_std"] or 0.0, color=colour, marker="o")
            right.annotate(line["method"], place, fontsize=7, xytext=(4, 3), textcoords="offset points")
    right.set(xscale="log", xlabel="bytes up and down, all clients", ylabel="test accuracy")
    right.margins(x=0.2)
    right.grid(alpha=0.3)
    return drawn


def write(folder: Path, planned: Sequence[PlannedRun], table: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    """Table and figure, as files and for TensorBoard, beside the runs' curves."""
    from fdl.runs.compare_report import log_compare
    from fdl.utils.tensorboard import open_writer

    (folder / "methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open(folder / "methods.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    results = [{"variant": r.variant, "seed": r.seed, "summary": runs.read_summary(r.folder)} for r in planned]
    log_compare(folder, results)
    drawn = figure(table, lines[0].rstrip("."))
    drawn.savefig(folder / "methods.png")
    events = open_writer(folder / "tensorboard" / "summary")
    events.add_figure("methods/accuracy", drawn, 0, close=False)
    events.add_text("methods/table", "\n".join(lines), 0)
    events.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Check that work is equal, run everything, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe, for every method")
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--file", type=Path, help="the images, for cifar10; default as in communication.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these variants of methods.yaml and centralized")
    parser.add_argument("--quick", action="store_true", help="few methods, clients and steps: tells nothing, tests all")
    parser.add_argument("--output", type=Path, help="default runs/methods-<data>")
    options = parser.parse_intermixed_args(argv)
    folder = options.output or Path("runs") / f"methods-{options.data}"
    wanted = options.only or (FEW if options.quick else None)
    methods = None if wanted is None else list(dict.fromkeys([CENTRAL, *wanted]))
    changes = [*overrides(options.data, options.file, options.quick), *options.overrides]
    planned = [at_once(run) for run in plan(RECIPE, changes, methods, options.seeds, folder)]
    assert_equal_work(planned)
    for number, run in enumerate(planned, 1):
        note = ", complete already" if runs.is_complete(run.recipe, run.folder) else ""
        print(f"{number} of {len(planned)}: {run.variant}, seed {run.seed}{note}", flush=True)
        if not note:
            carry_out(run)
    table = tabulate(planned)
    recipe = planned[0].recipe
    title = f"{options.data}, {recipe.federation.clients} clients, {recipe.federation.rounds} rounds."
    lines = markdown(table, title)
    write(folder, planned, table, lines)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
