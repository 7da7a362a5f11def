"""What metrics and figures cost where there are many classes, as ratios to the answers themselves.

    python benchmarks/many_classes.py [--classes 10 100 1000] [--samples 10000] [--output DIR]

Every measurement has a process of its own, with torch set as in a run: deterministic, one thread. Memory is by how much
the process's peak grows, as a ratio to the bytes of the logits [samples, classes] in single precision, which are there
before; time is the smallest of several, as a ratio to that of one softmax of them. Ratios that do not grow with the
number of classes mean that nothing of samples × classes² is made. For comparison, torchmetrics' confusion matrix is
measured in the same way as far as the memory it asks for (9 bytes × samples × classes²) stays below a gigabyte.

DIR gets many_classes.md (the table) and many_classes.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

COLUMNS = ("what", "classes", "samples", "peak_bytes", "peak_ratio", "seconds", "time_ratio")
METRICS = ("accuracy", "nll", "macro_f1", "ece", "top5")
FIGURES = ("confusion matrix", "figure of confusions", "figure of clients")
PEER = "torchmetrics' confusion matrix"
PEER_BYTES = 1 << 30
REPEATS = 5


def measure(what: str, classes: int, samples: int) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    from fdl.federation.summary import _peak_rss as peak

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), labels] += 3.0
    work = job(what, classes, logits, labels)
    small = torch.randn(64, classes, generator=generator)
    job(what, classes, small, labels[:64])()  # what is imported and set up once does not count
    before = peak()
    work()
    grown = peak() - before

    def seconds(function: Callable[[], Any]) -> float:
        return min(_timed(function) for _ in range(REPEATS))

    took, yardstick = seconds(work), seconds(lambda: logits.softmax(1))
    values = (what, classes, samples, grown, grown / logits.nbytes, took, took / yardstick)
    return dict(zip(COLUMNS, values))


def job(what: str, classes: int, logits: Any, labels: Any) -> Callable[[], Any]:
    """What is measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from fdl.metrics import classification as metrics
    from fdl.utils import figures

    names = [f"class {i}" for i in range(classes)]
    if what in METRICS:
        return lambda: metrics.classification(logits, labels, [what])
    if what == PEER:
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        return lambda: multiclass_confusion_matrix(logits.argmax(1), labels, classes, validate_args=False)
    matrix = metrics.confusion_matrix(logits.argmax(1), labels, classes).numpy()
    works: dict[str, Callable[[], Any]] = {
        "confusion matrix": lambda: metrics.confusion_matrix(logits.argmax(1), labels, classes),
        "figure of confusions": lambda: FigureCanvasAgg(figures.confusion(matrix, names, "test")).draw(),
        "figure of clients": lambda: FigureCanvasAgg(figures.label_histogram(matrix[:10], names)).draw(),
    }
    return works[what]


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as Markdown."""
    lines = [
        "| what | classes | samples | memory beside the logits | of their bytes | seconds | of one softmax |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['classes']:,} | {row['samples']:,} | {row['peak_bytes'] / 1e6:.1f} MB | "
            f"{row['peak_ratio']:.2f} | {row['seconds']:.4f} | {row['time_ratio']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure everything, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "CLASSES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.samples)))
        return
    rows = []
    for what, classes in product((*METRICS, *FIGURES, PEER), options.classes):
        if what == PEER and 9 * options.samples * classes**2 > PEER_BYTES:
            continue
        command = [sys.executable, __file__, "--samples", str(options.samples), "--one", what, str(classes)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{what}, {classes} classes:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(table(rows))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "many_classes.md").write_text(table(rows), encoding="utf-8")
        with open(options.output / "many_classes.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
