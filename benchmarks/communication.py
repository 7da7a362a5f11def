"""Accuracy against bytes: FedAvg, FedProx, FedDF, DS-FL, CFD and confidence-weighted distillation.

    python benchmarks/communication.py [--data cifar10] [--file FILE.npz] [--seeds 0 1 2] [--quick] [--output DIR]

The job: benchmarks/communication.yaml, digits or photographs, non-IID clients (Dirichlet, alpha 0.1), one
architecture everywhere. Equal work is asserted before anything runs: in each seed every method has the same data, the
same shares, and the same local steps, batches and optimiser in every round, and as many server steps where it has
any. Digesting what comes back comes on top where a method has that, and is listed. Every method is coded as serves it
best, FedAvg in float32, which counts as 100 %, and coded; how it learns from answers is its own.

Bytes are those of encoded messages, up and down, all clients. A run's student is the one of the best round so far on
validation data; its accuracy is on test data. Next to the runs themselves, DIR gets communication.md and
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
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from fdl import runs
from fdl.compare import Run, plan
from fdl.recipe import difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = Path(__file__).with_name("communication.yaml")
REFERENCE = "fedavg"
EQUAL = (
    *("seed", "data", "partition", "federation", "student", "specialists", "local", "evaluation"),
    *("distil.steps", "distil.batch_size"),
)
CNN = "{target: cnn, args: {channels: [16, 32, 32]}}"
CIFAR10 = [
    "federation.rounds=10",
    f"student={CNN}",
    f"specialists=[{CNN}]",
    "local.steps=40",
    "local.optimizer.args.lr=0.05",
    "digest.steps=20",
    "distil.steps=200",
]
QUICK = ["federation.clients=3", "federation.rounds=3", "local.steps=10", "digest.steps=5", "distil.steps=20"]


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


def assert_equal_work(planned: Sequence[Run]) -> None:
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
            assert [client.local for client in loop.clients] == [client.local for client in loops[0].clients]
            architectures = [loop.runtime.template(client.architecture).backbone for client in loop.clients]
            assert len({str(network) for network in architectures}) == 1, "clients have several architectures"


def points(run: Run) -> list[Point]:
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


def row(planned: Sequence[Run], method: str, reference: dict[int, int]) -> dict[str, Any]:
    """One method's row: means and deviations over seeds, each at its best round on validation data.

    Args:
        planned: all runs, done.
        method: whose row.
        reference: by seed, the bytes that count as 100 %.
    """
    mine = [run for run in planned if run.variant == method]
    chosen = [best_point(run) for run in mine]
    spread = statistics.stdev(point.accuracy for point in chosen) if len(chosen) > 1 else None
    shares = [100 * point.sent / reference[point.seed] for point in chosen]
    last = runs.read_summary(mine[0].folder)["history"][-1]
    digests = any(key.startswith("digest/") for metrics in last["clients"].values() for key in metrics)
    recipe = mine[0].recipe
    return {
        "method": method,
        "seeds": len(chosen),
        "accuracy": statistics.fmean(point.accuracy for point in chosen),
        "accuracy_std": spread,
        "upload_bytes": round(statistics.fmean(point.upload for point in chosen)),
        "download_bytes": round(statistics.fmean(point.download for point in chosen)),
        "bytes": round(statistics.fmean(point.sent for point in chosen)),
        "percent_of_reference": statistics.fmean(shares),
        "best_round": statistics.fmean(point.round for point in chosen),
        "bytes_all_rounds": round(statistics.fmean(points(run)[-1].sent for run in mine)),
        "local_steps": recipe.local.steps,
        "digest_steps": recipe.digest.steps if digests else 0,
    }


def best_point(run: Run) -> Point:
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
        f"| method | test accuracy | up, MB | down, MB | both, MB | % of {REFERENCE} | best round | all rounds, MB "
        "| client steps a round | on the front |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for line in table:
        spread = "" if line["accuracy_std"] is None else f" ± {line['accuracy_std']:.3f}"
        sent = (f"{line[key] / 1e6:.3f}" for key in ("upload_bytes", "download_bytes", "bytes"))
        steps = f"{line['local_steps']}" + (f" + {line['digest_steps']} digest" if line["digest_steps"] else "")
        lines.append(
            f"| {line['method']} | {line['accuracy']:.3f}{spread} | {' | '.join(sent)} "
            f"| {line['percent_of_reference']:.2f} | {line['best_round']:.1f} | {line['bytes_all_rounds'] / 1e6:.3f} "
            f"| {steps} | {'yes' if line['method'] in best else ''} |"
        )
    return [*lines, "", "Mean ± standard deviation over seeds, at each run's best round on validation data.", ""]


def figure(planned: Sequence[Run], table: Sequence[dict[str, Any]], title: str) -> Figure:
    """Accuracy of the student at best validation over bytes, every run, and the front of the means."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    drawn = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = drawn.add_subplot()
    for number, line in enumerate(table):
        colour, method = f"C{number}", line["method"]
        for run in planned:
            if run.variant == method:
                found = points(run)
                axes.plot([p.sent for p in found], [p.best for p in found], color=colour, alpha=0.35, linewidth=1)
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


def write(folder: Path, planned: Sequence[Run], table: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    """Table, points and figure, as files and for TensorBoard; the runs' curves are there already."""
    from fdl.callbacks.events import open_writer
    from fdl.compare_report import log_compare

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
        runs.fit(run.recipe, run.folder, resume=runs.has_checkpoint(run.folder))
    reference = {run.seed: best_point(run).sent for run in planned if run.variant == REFERENCE}
    table = [row(planned, method, reference) for method in dict.fromkeys(run.variant for run in planned)]
    recipe = planned[0].recipe
    title = f"{options.data}, {recipe.federation.clients} clients, {recipe.federation.rounds} rounds."
    lines = [*markdown(table, title), *codec_table(options.quick)]
    write(folder, planned, table, lines)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
