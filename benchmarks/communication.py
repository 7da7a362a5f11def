"""Accuracy against bytes: FedAvg, FedProx, FedDF, DS-FL, CFD and confidence-weighted distillation.

    python benchmarks/communication.py [--data cifar10] [--file FILE.npz] [--seeds 0 1 2] [--quick] [--output DIR]

The job: benchmarks/communication.yaml, digits or photographs, non-IID clients (Dirichlet, alpha 0.1), one
architecture everywhere. Equal work is asserted before anything runs: in each seed every method has the same data, the
same shares, and the same local steps, batches and optimiser in every round, and as many server steps where it has
any. Digesting what comes back comes on top where a method has that, and is listed. Every method is coded as serves it
best, FedAvg in float32, which counts as 100 %, and coded; how it learns from answers is its own.

A run's student is the one after the last round; its accuracy is on test data. That of the best round on validation
data, which takes labels that a server hardly has, stands beside it. Bytes are those of encoded messages, up and down,
all clients, of all rounds; the column "together" adds what is sent before round 1 (the proxy set, to every site) and
the final student, uncompressed, to every site. Next to the runs themselves, DIR gets communication.md and
communication.csv (the table), points.csv (every round of every run), pareto.png, and tensorboard/ with the same figure,
curves by round and by bytes, and hyperparameters. A second table has size and speed of codec chains, as
benchmarks/codecs.py measures them. Runs that are complete in DIR are not run again.

--data cifar10 takes images from an .npz file with x_train, y_train, x_test and y_test, by default
$FDL_DATA/cifar10_lossless_7k.npz, and reduces them to 16 × 16, so that a CPU is done in minutes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from fdl.metrics.federation import paired_difference
from fdl.recipe import difference
from fdl.runs import run as runs
from fdl.runs.compare import PlannedRun, plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = Path(__file__).with_name("communication.yaml")
REFERENCE, CODED = "fedavg", "fedavg_coded"
DIFFERENCE = ("difference", "difference_low", "difference_high")
"""Of accuracies after the last round to `CODED` with the same seed: mean and 95 % t interval."""
EQUAL = (
    *("seed", "data", "partition", "federation", "student", "specialists", "local_training", "evaluation"),
    *("server_distil.steps", "server_distil.batch_size"),
)
CNN = "{target: cnn, args: {channels: [16, 32, 32]}}"
CIFAR10 = [
    "federation.rounds=10",
    f"student={CNN}",
    f"specialists=[{CNN}]",
    "local_training.steps=40",
    "local_training.optimizer.args.lr=0.05",
    "client_distil.steps=20",
    "server_distil.steps=200",
]
QUICK = [
    "federation.clients=3",
    "federation.rounds=3",
    "local_training.steps=10",
    "client_distil.steps=5",
    "server_distil.steps=20",
]


class Point(NamedTuple):
    """One round of one run.

    Attributes:
        method: a variant of the recipe.
        seed: of the run.
        round: counted from 1.
        upload: bytes so far.
        download: likewise.
        accuracy: of the round's student on test data.
        best: that of the student of the best round so far on validation data.
    """

    method: str
    seed: int
    round: int
    upload: int
    download: int
    accuracy: float
    best: float

    @property
    def sent(self) -> int:
        """Bytes up and down so far."""
        return self.upload + self.download


def together(run: PlannedRun) -> int:
    """Bytes of all messages, of what is sent before round 1, and of the final student to every site."""
    sent = runs.read_summary(run.folder)["communication"]
    return sum(sent[f"{part}_bytes"] for part in ("upload", "download", "setup", "student_delivery"))


def assert_equal_work(planned: Sequence[PlannedRun]) -> None:
    """Same recipe but for method and channel, and, once built, same shares of same data, for all methods of a seed."""
    from fdl.build import build

    for seed in {run.seed for run in planned}:
        same = [run for run in planned if run.seed == seed]
        first = same[0].recipe.to_dict()
        loops = [build(run.recipe, run.folder) for run in same]
        for run, loop in zip(same, loops):
            changed = [
                key
                for key in difference(first, run.recipe.to_dict())
                if any(f"{key}.".startswith(f"{part}.") for part in EQUAL)
            ]
            assert not changed, f"{run.variant} and {same[0].variant} differ in {changed}"
            assert loop.fingerprint == loops[0].fingerprint, f"{run.variant} has other data than {same[0].variant}"
            assert [client.local_training for client in loop.clients] == [
                client.local_training for client in loops[0].clients
            ]
            architectures = [loop.runtime.shared_module(client.architecture).backbone for client in loop.clients]
            assert len({str(network) for network in architectures}) == 1, "clients have several architectures"


def points(run: PlannedRun) -> list[Point]:
    """Every round that was measured, in order."""
    found, best, leading = [], (-1.0, 0.0), 0.0
    for record in runs.read_summary(run.folder)["history"]:
        metrics, sent = record["metrics"], record["communication"]
        if record["round"] < 1 or "student/test/accuracy" not in metrics:
            continue
        # as in a run's summary: accuracy first, then likelihood
        score = metrics["student/validation/accuracy"], -metrics["student/validation/nll"]
        if score > best or not found:
            best, leading = score, metrics["student/test/accuracy"]
        counts = sent["upload_bytes"], sent["download_bytes"]
        found.append(Point(run.variant, run.seed, record["round"], *counts, metrics["student/test/accuracy"], leading))
    return found


def row(planned: Sequence[PlannedRun], method: str) -> dict[str, Any]:
    """One method's row: means over seeds, and deviations of accuracies, after the last round.

    Args:
        planned: all runs, done.
        method: whose row.
    """
    mine = [run for run in planned if run.variant == method]
    last, best = [points(run)[-1] for run in mine], [best_point(run) for run in mine]
    history = runs.read_summary(mine[0].folder)["history"][-1]
    digests = any(key.startswith("digest/") for metrics in history["clients"].values() for key in metrics)
    recipe = mine[0].recipe
    found = {
        "method": method,
        "seeds": len(last),
        "accuracy": statistics.fmean(point.accuracy for point in last),
        "accuracy_std": _spread([point.accuracy for point in last]),
        "accuracy_best": statistics.fmean(point.accuracy for point in best),
        "accuracy_best_std": _spread([point.accuracy for point in best]),
        "best_round": statistics.fmean(point.round for point in best),
        "upload_bytes": round(statistics.fmean(point.upload for point in last)),
        "download_bytes": round(statistics.fmean(point.download for point in last)),
        "bytes": round(statistics.fmean(point.sent for point in last)),
        "bytes_together": round(statistics.fmean(together(run) for run in mine)),
        "local_steps": recipe.local_training.steps,
        "digest_steps": recipe.client_distil.steps if digests else 0,
    }
    for name in (REFERENCE, CODED):
        theirs = {run.seed: run for run in planned if run.variant == name}
        pairs = [(run, theirs[run.seed]) for run in mine]
        shares = [points(run)[-1].sent / points(other)[-1].sent for run, other in pairs]
        whole = [together(run) / together(other) for run, other in pairs]
        found[f"percent_of_{name}"] = 100 * statistics.fmean(shares)
        found[f"percent_of_{name}_together"] = 100 * statistics.fmean(whole)
    if method != CODED:
        other = [points(run)[-1].accuracy for run in planned if run.variant == CODED]
        found |= dict(zip(DIFFERENCE, paired_difference([point.accuracy for point in last], other)))
    else:
        found |= dict.fromkeys(DIFFERENCE)
    return found


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def best_point(run: PlannedRun) -> Point:
    """The best round of a run on validation data."""
    best = runs.read_summary(run.folder)["best"]["round"]
    return next(point for point in points(run) if point.round == best)


def front(table: Sequence[dict[str, Any]]) -> list[str]:
    """Methods that no other beats in accuracy without more bytes, the cheapest first."""
    kept: list[dict[str, Any]] = []
    for line in sorted(table, key=lambda line: (line["bytes"], -line["accuracy"])):
        if not kept or line["accuracy"] > kept[-1]["accuracy"]:
            kept.append(line)
    return [line["method"] for line in kept]


def markdown(table: Sequence[dict[str, Any]], title: str) -> list[str]:
    """The table for people."""
    best = set(front(table))
    lines = [
        title,
        "",
        f"| method | test accuracy | difference to {CODED} | up, MB | down, MB | both, MB | % of {REFERENCE} "
        f"| % of {CODED} | together, MB | % of {CODED}, together | best round | accuracy there | client steps a round "
        "| on the front |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for line in table:
        sent = {key: f"{line[key] / 1e6:.3f}" for key in line if "bytes" in key}
        cells = [
            line["method"],
            _score(line, "accuracy"),
            _difference(line),
            *(sent[key] for key in ("upload_bytes", "download_bytes", "bytes")),
            f"{line[f'percent_of_{REFERENCE}']:.2f}",
            f"{line[f'percent_of_{CODED}']:.1f}",
            sent["bytes_together"],
            f"{line[f'percent_of_{CODED}_together']:.1f}",
            f"{line['best_round']:.1f}",
            _score(line, "accuracy_best"),
            f"{line['local_steps']}" + (f" + {line['digest_steps']} digest" if line["digest_steps"] else ""),
            "yes" if line["method"] in best else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Mean ± standard deviation over seeds, after the last round; differences with their 95 % t interval. Together: "
        "with what is sent before round 1 and the final student to all sites.",
        "",
    ]


def _score(line: dict[str, Any], key: str) -> str:
    spread = line[f"{key}_std"]
    return f"{line[key]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _difference(line: dict[str, Any]) -> str:
    mean, low, high = (line[key] for key in DIFFERENCE)
    if mean is None:
        return ""
    return f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if math.isfinite(low) else "")


def figure(planned: Sequence[PlannedRun], table: Sequence[dict[str, Any]], title: str) -> Figure:
    """Accuracy of every round's student over bytes, every run, and the front of the means of the last round."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    drawn = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = drawn.add_subplot()
    for number, line in enumerate(table):
        colour, method = f"C{number}", line["method"]
        for run in planned:
            if run.variant == method:
                found = points(run)
                axes.plot([p.sent for p in found], [p.accuracy for p in found], color=colour, alpha=0.35, linewidth=1)
        spread = line["accuracy_std"] or 0.0
        axes.errorbar(line["bytes"], line["accuracy"], spread, color=colour, marker="o", capsize=3, label=method)
    means = {line["method"]: (line["bytes"], line["accuracy"]) for line in table}
    steps = [means[method] for method in front(table)]
    axes.step(*zip(*steps), where="post", color="black", linestyle=":", linewidth=1, label="Pareto front")
    axes.set(xscale="log", xlabel="bytes up and down, all clients", ylabel="test accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return drawn


def codec_benchmark() -> ModuleType:
    """The neighbouring script; by its path, since Python has a module `codecs` of its own."""
    spec = importlib.util.spec_from_file_location("codec_benchmark", Path(__file__).with_name("codecs.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def codec_table(quick: bool) -> list[str]:
    """Size and speed of every chain, as benchmarks/codecs.py measures them."""
    codecs = codec_benchmark()
    count, repeats = (300, 1) if quick else (5000, 5)
    rounds = codecs.matrices(count, 100)
    return [
        f"Codec chains on one response matrix {count:,} × 100, float32, {rounds[0].nbytes:,} bytes; one thread, best "
        f"of {repeats}.",
        "",
        "| chain | bytes | × smaller | entropy of its codes | × entropy | MB/s in | MB/s out |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(codecs.row(stages, rounds, repeats) for stages in codecs.CHAINS),
    ]


def write(folder: Path, planned: Sequence[PlannedRun], table: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    """Table, points and figure, as files and for TensorBoard; the runs' curves are there already."""
    from fdl.runs.compare_report import log_compare
    from fdl.utils.tensorboard import open_writer

    title = lines[0].rstrip(".")
    (folder / "communication.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    every = [point._asdict() for run in planned for point in points(run)]
    for name, rows in (("communication.csv", table), ("points.csv", every)):
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    results = [{"variant": r.variant, "seed": r.seed, "summary": runs.read_summary(r.folder)} for r in planned]
    log_compare(folder, results)
    drawn = figure(planned, table, title)
    drawn.savefig(folder / "pareto.png")
    events = open_writer(folder / "tensorboard" / "summary")
    events.add_figure("communication/pareto", drawn, 0, close=False)
    events.add_text("communication/table", "\n".join(lines), 0)
    events.close()


def overrides(data: str, file: Path | None, quick: bool) -> list[str]:
    """What the arguments change in the recipe."""
    changes = []
    if data == "cifar10":
        path = file or Path(os.environ.get("FDL_DATA", ".")) / "cifar10_lossless_7k.npz"
        inner = f"path: {path}, size: 16, normalize: true, proxy: 1500, validation: 500"
        changes = [f"data={{target: arrays, args: {{{inner}}}}}", *CIFAR10]
    return [*changes, *(QUICK if quick else ())]


def main(argv: Sequence[str] | None = None) -> int:
    """Check that work is equal, run everything, and write and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--file", type=Path, help="the images, for cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="few clients, rounds and steps: tells nothing, tests all")
    parser.add_argument("--output", type=Path, help="default runs/communication-<data>")
    options = parser.parse_args(argv)
    folder = options.output or Path("runs") / f"communication-{options.data}"
    changes = overrides(options.data, options.file, options.quick)
    planned = plan(RECIPE, changes, None, options.seeds, folder)
    assert_equal_work(planned)
    for number, run in enumerate(planned, 1):
        print(f"{number} of {len(planned)}: {run.variant}, seed {run.seed}", flush=True)
        runs.run_recipe(run.recipe, run.folder, resume=runs.has_checkpoint(run.folder))
    table = [row(planned, method) for method in dict.fromkeys(run.variant for run in planned)]
    recipe = planned[0].recipe
    title = f"{options.data}, {recipe.federation.clients} clients, {recipe.federation.rounds} rounds."
    lines = [*markdown(table, title), *codec_table(options.quick)]
    write(folder, planned, table, lines)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
