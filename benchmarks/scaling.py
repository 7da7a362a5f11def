"""Round time, bytes, memory and quality against the number of clients.

    python benchmarks/scaling.py [--clients 5 10 20 50] [--file FILE.npz] [--per-client N] [--methods A B] [--output D]

Two series. *Fixed total*: the same images are shared out among more and more clients, so that each has fewer. *Fixed
per client*: every client has N images, so that there are more and more. Images are scikit-learn's digits, or those of
FILE (x_train, y_train, x_test, y_test), of which as many are taken as the largest number of clients needs; with more
than some fifty clients the digits do not suffice. Clients are alike (IID), all are asked in every round, and each takes
one pass over its images; the server takes the same steps whatever their number.

Every run has a process of its own: its peak memory is its own, interpreter and libraries included. Seconds of a round
are the median over all rounds but the first. D gets scaling.md (the table), scaling.csv, scaling.png, the runs, and the
figure for TensorBoard. Runs that are complete in D are not run again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fdl.recipe import from_mapping
from fdl.runs import run as runs
from fdl.runs.compare import PlannedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = ("total", "per client")
PROXY, VALIDATION, TEST = 300, 100, 360
MODEL = {"target": "mlp", "args": {"hidden": [128, 64]}}
SGD = {"target": "sgd", "args": {"lr": 0.1}}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": {"target": "fedavg"}},
    "fedavg, batched": {"method": {"target": "fedavg"}, "client_execution": "vectorized"},
    "federated_distillation": {
        "method": {"target": "federated_distillation", "args": {"confidence": {"target": "entropy"}}},
        "specialists": [MODEL],
        "server_distil": {"steps": 100, "batch_size": 64, "optimizer": SGD},
        "client_distil": {"steps": 0},
        "channel": {"upload": [{"target": "one_hot"}, {"target": "range"}]},
    },
}
COLUMNS = ("method", "fixed", "clients", "images", "round_s", "bytes", "peak_rss_bytes", "accuracy")


def neighbour(name: str) -> ModuleType:
    """Another script of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(file: Path | None) -> dict[str, np.ndarray]:
    """All images: training, shuffled once, and test."""
    if file is not None:
        with np.load(file) as arrays:
            found = {name: arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))
        x, y = (x.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)[order], y[order]
        found = {"x_train": x[:-TEST], "y_train": y[:-TEST], "x_test": x[-TEST:], "y_test": y[-TEST:]}
    order = np.random.default_rng(1).permutation(len(found["x_train"]))
    return found | {name: found[name][order] for name in ("x_train", "y_train")}


def plan(options: argparse.Namespace, folder: Path) -> list[PlannedRun]:
    """One run for every method, series and number of clients; their images are written to `folder`.

    Raises:
        SystemExit: there are too few images.
    """
    arrays, most = images(options.file), max(options.clients)
    public, planned = PROXY + VALIDATION, []
    share = options.per_client or (len(arrays["y_train"]) - public) // most
    if share < 1 or public + share * most > len(arrays["y_train"]):
        raise SystemExit(f"{most} clients with {max(share, 1)} images each need more than {len(arrays['y_train'])}")
    folder.mkdir(parents=True, exist_ok=True)
    for series, clients in product(SERIES, sorted(options.clients)):
        count = public + share * (most if series == "total" else clients)
        file = folder / f"images-{count}.npz"
        if not file.exists():
            np.savez(file, **arrays | {name: arrays[name][:count] for name in ("x_train", "y_train")})
        for method in options.methods:
            name = f"{method.replace(', ', '-')}-{series.replace(' ', '-')}-{clients}"
            tree = {
                "name": name,
                "data": {"target": "arrays", "args": {"path": str(file), "proxy": PROXY, "validation": VALIDATION}},
                "federation": {"clients": clients, "rounds": options.rounds, "calibration_fraction": 0.0},
                "student": MODEL,
                "local_training": {"epochs": 1, "batch_size": 32, "optimizer": SGD},
                "evaluation": {"metrics": ["accuracy"], "specialists": False},
                "checkpoint": {"every": options.rounds},
                "fabric": {"accelerator": "cpu", "threads": 1},
                "callbacks": [],
            }
            planned.append(PlannedRun(method, clients, from_mapping(tree | METHODS[method]), folder / name))
    return planned


def measure(run: PlannedRun) -> dict[str, Any]:
    """What one run came to."""
    summary = runs.read_summary(run.folder)
    totals = [sum(record["seconds"].values()) for record in summary["history"]]
    sent = summary["communication"]
    return {
        "method": run.variant,
        "fixed": "total" if "-total-" in run.folder.name else "per client",
        "clients": run.recipe.federation.clients,
        "images": sum(entry["samples"] for entry in summary["participants"]),
        "round_s": statistics.median(later - earlier for earlier, later in pairwise(totals)),
        "bytes": (sent["upload_bytes"] + sent["download_bytes"]) / summary["rounds"],
        "peak_rss_bytes": summary["memory"]["peak_rss_bytes"],
        "accuracy": summary["metrics"]["student/test/accuracy"],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people; the time of a round also for each client and its images."""
    lines = [
        "| method | fixed | clients | images | ms a round | ms a client | kB a round | peak MB | test accuracy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            *(row["method"], row["fixed"], f"{row['clients']:,}", f"{row['images']:,}"),
            *(f"{1000 * row['round_s']:.1f}", f"{1000 * row['round_s'] / row['clients']:.2f}"),
            *(f"{row['bytes'] / 1e3:.1f}", f"{row['peak_rss_bytes'] / 1e6:.0f}", f"{row['accuracy']:.3f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Four quantities against clients; full lines for a fixed total, dashed ones for a fixed share."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    drawn = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    labels = {"round_s": "seconds a round", "bytes": "bytes a round", "peak_rss_bytes": "peak memory, bytes"}
    for axes, (key, label) in zip(drawn.subplots(2, 2).flat, {**labels, "accuracy": "test accuracy"}.items()):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            for series, style in zip(SERIES, ("-o", "--s")):
                some = [row for row in rows if (row["method"], row["fixed"]) == (method, series)]
                values = [row[key] for row in some]
                axes.plot(
                    [row["clients"] for row in some], values, style, color=f"C{number}", label=f"{method}, {series}"
                )
        axes.set(xscale="log", xlabel="clients", ylabel=label)
        axes.set_yscale("log" if key in ("round_s", "bytes") else "linear")
        axes.set_ylim(0 if key == "peak_rss_bytes" else None)
        counts = sorted({row["clients"] for row in rows})
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, title="method, what is fixed")
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--file", type=Path, help="images, as the datamodule arrays reads them; default digits")
    parser.add_argument("--per-client", type=int, help="images of a client; default as many as there are for the most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    options = parser.parse_args(argv)
    planned = plan(options, options.output)
    carry_out = neighbour("methods").carry_out
    for number, run in enumerate(planned, 1):
        print(f"{number} of {len(planned)}: {run.folder.name}", flush=True)
        if not runs.is_complete(run.recipe, run.folder):
            carry_out(run)
    rows = [measure(run) for run in planned]
    table = markdown(rows)
    (options.output / "scaling.md").write_text(table + "\n", encoding="utf-8")
    with open(options.output / "scaling.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    from fdl.utils.tensorboard import open_writer

    drawn = figure(rows)
    drawn.savefig(options.output / "scaling.png")
    events = open_writer(options.output / "tensorboard")
    events.add_figure("scaling", drawn, 0, close=False)
    events.add_text("scaling/table", table, 0)
    events.close()
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
