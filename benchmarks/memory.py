"""Peak memory against the number of clients, whose models and states lie in memory or on disk.

    python benchmarks/memory.py [--clients 5 50 500 5000] [--jobs mlp vit] [--in-memory 500] [--output DIR]

Every run has a process of its own: its peak is its own, interpreter and libraries included. Clients are personal: each
keeps a specialist between its turns (federated distillation), and before the first round all of them have one, as after
a long run. Five are asked in a round, whatever their number; all runs share out the same 50,000 images, so only what
the framework keeps of a client can grow. Equal work is asserted: the same number of turns, steps and uploaded bytes in
every run of a job.

DIR gets memory.md (the table), memory.csv, memory.png and the figure in TensorBoard.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

ASKED, IMAGES = 5, 50_000
JOBS: dict[str, dict[str, Any]] = {
    "mlp": {"target": "mlp", "args": {"hidden": [256, 128]}},
    "vit": {"target": "vit", "args": {"patch": 2, "dim": 96, "depth": 4, "heads": 3}},
}
COLUMNS = ("job", "parameters", "clients", "state", "peak_rss_bytes", "ratio", "seconds")


def recipe(job: str, clients: int, state: str, images: Path) -> dict[str, Any]:
    """The run as a recipe."""
    return {
        "name": "memory",
        "method": {"target": "federated_distillation"},
        "data": {"target": "arrays", "args": {"path": str(images), "proxy": 200, "validation": 50}},
        "federation": {"clients": clients, "rounds": 3, "client_fraction": ASKED / clients, "client_state": state},
        "specialists": [JOBS[job]],
        "student": {"target": "mlp", "args": {"hidden": [16]}},
        "local_training": {"steps": 2, "batch_size": 32},
        "server_distil": {"steps": 2, "batch_size": 32},
        "evaluation": {"metrics": ["accuracy"], "specialists": False},
        "checkpoint": {"keep": 1},
        "fabric": {"accelerator": "cpu", "threads": 1},
        "callbacks": [],
    }


def one(job: str, clients: int, state: str, folder: Path) -> dict[str, Any]:
    """One run, in this process."""
    from fdl.build import build
    from fdl.federation.summary import summarise
    from fdl.recipe import from_mapping

    loop = build(from_mapping(recipe(job, clients, state, folder / "images.npz")), folder / f"{job}-{clients}-{state}")
    for client in loop.clients:
        with client.turn():
            client.save_specialist(client.specialist())
        client.offload_state()
    loop.run()
    summary = summarise(loop)
    return {
        "job": job,
        "parameters": summary["participants"][0]["parameters"],
        "clients": clients,
        "state": state,
        "peak_rss_bytes": summary["memory"]["peak_rss_bytes"],
        "seconds": summary["time"]["total_s"],
        "turns": sum(len(record["clients"]) for record in summary["history"]),
        "upload_bytes": summary["communication"]["upload_bytes"],
    }


def apart(job: str, clients: int, state: str, folder: Path) -> dict[str, Any]:
    """One run, in a process of its own."""
    command = [sys.executable, __file__, "--one", job, str(clients), state, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"{job}, {clients} clients, {state}: {answer.stderr[-2000:]}")
    shutil.rmtree(folder / f"{job}-{clients}-{state}")
    return json.loads(answer.stdout.strip().splitlines()[-1])


def draw_images(path: Path) -> None:
    """The data: what is in the pictures does not matter here."""
    rng = np.random.default_rng(0)
    sets = {"train": IMAGES, "test": 100}
    arrays = {f"x_{name}": rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for name, n in sets.items()}
    arrays |= {f"y_{name}": rng.integers(0, 10, n) for name, n in sets.items()}
    np.savez(path, **arrays)


def assert_equal_work(rows: list[dict[str, Any]]) -> None:
    """Whatever the number of clients, as many took their turn, and they sent as much but for a longer number."""
    for job in {row["job"] for row in rows}:
        for key, slack in (("turns", 1), ("parameters", 1), ("upload_bytes", 1.001)):
            values = {row[key] for row in rows if row["job"] == job}
            assert max(values) <= slack * min(values), f"{job}: {key} differ: {values}"


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peaks relative to the run with the fewest clients of the same job and place."""
    for row in rows:
        least = min(
            (r for r in rows if (r["job"], r["state"]) == (row["job"], row["state"])), key=itemgetter("clients")
        )
        row["ratio"] = row["peak_rss_bytes"] / least["peak_rss_bytes"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model of a client | clients | their states | peak memory, MB | ratio to the fewest clients | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        where = "on disk" if row["state"] == "disk" else "in memory"
        lines.append(
            f"| {row['job']}, {row['parameters']:,} parameters | {row['clients']:,} | {where} "
            f"| {row['peak_rss_bytes'] / 1e6:.0f} | {row['ratio']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Peak memory against clients, a line for each job and place."""
    drawing = Figure(figsize=(6, 4), layout="constrained")
    axes = drawing.subplots()
    for job, state in dict.fromkeys((row["job"], row["state"]) for row in rows):
        some = [row for row in rows if (row["job"], row["state"]) == (job, state)]
        peaks = [row["peak_rss_bytes"] / 1e6 for row in some]
        axes.plot([row["clients"] for row in some], peaks, "o-", label=f"{job}, in {state}")
    axes.set(xscale="log", xlabel="clients", ylabel="peak memory, MB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawing


def main() -> None:
    """Measure, print, and leave the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 50, 500, 5000])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--in-memory", type=int, default=500, help="most clients that are run with states in memory")
    parser.add_argument("--output", type=Path, default=Path("runs/memory"))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        job, clients, state, folder = options.one
        print(json.dumps(one(job, int(clients), state, Path(folder))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        draw_images(Path(name) / "images.npz")
        for job, state, clients in product(options.jobs, ("disk", "memory"), sorted(options.clients)):
            if state == "disk" or clients <= options.in_memory:
                rows.append(apart(job, clients, state, Path(name)))
                print(f"{job}, {clients} clients, {state}: {rows[-1]['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    assert_equal_work(rows)
    rows = with_ratios(rows)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "memory.md").write_text(table(rows) + "\n", encoding="utf-8")
    with open(options.output / "memory.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    drawing = figure(rows)
    drawing.savefig(options.output / "memory.png", dpi=150)
    with SummaryWriter(options.output / "tensorboard") as writer:
        writer.add_figure("memory", drawing)
    print(table(rows))


if __name__ == "__main__":
    main()
