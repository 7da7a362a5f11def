"""The job in fdl. Usage: python fdl_job.py JOB.npz MODEL COHORT ROUNDS EXECUTOR RANKS; prints one JSON line.

What is timed is a whole round, with every byte encoded, checked, decoded and counted; no checkpoint falls into it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jobs
import numpy as np

from fdl.build import build
from fdl.callbacks.base import Callback
from fdl.engine.distributed.launcher import processes
from fdl.loop import FederatedLoop
from fdl.recipe import from_mapping


class Times(Callback):
    """When rounds begin and end."""

    name = "times"

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_round_start(self, loop: FederatedLoop, round: int) -> None:
        """The first one begins the clock."""
        self.times = self.times or [time.perf_counter()]

    def on_round_end(self, loop: FederatedLoop, record: dict[str, Any]) -> None:
        """A round is over."""
        self.times.append(time.perf_counter())


def arrays(path: Path, folder: Path) -> Path:
    """The job's file as the datamodule reads it: clients by group."""
    with np.load(path) as file:
        x = {name: file[name] for name in ("x_train", "x_test")}
        found = {"groups": file["share"], "y_train": file["y_train"], "y_test": file["y_test"], **x}
    np.savez(folder / "images.npz", **found)
    return folder / "images.npz"


def main() -> None:
    """Run the job once and print its times."""
    path, model, cohort, rounds, executor, ranks = sys.argv[1:7]
    with tempfile.TemporaryDirectory() as name:
        folder, clients = Path(name), 1 + int(np.load(path)["share"].max())
        recipe = from_mapping(
            {
                "name": "peers",
                "method": {"target": "fedavg"},
                "data": {
                    "target": "arrays",
                    "args": {"path": str(arrays(Path(path), folder)), "groups": "groups", "proxy": 0, "validation": 0},
                },
                "partition": {"target": "by_group"},
                "federation": {
                    "clients": clients,
                    "rounds": int(rounds),
                    "client_fraction": int(cohort) / clients,
                    "calibration_fraction": 0.0,
                },
                "student": {"target": "custom", "args": {"backbone": f"jobs.{model}"}},
                "local_training": {
                    "epochs": 1,
                    "batch_size": jobs.BATCH,
                    "optimizer": {"target": "sgd", "args": {"lr": jobs.RATE}},
                },
                "evaluation": {"metrics": ["accuracy"], "specialists": False},
                "checkpoint": {"every": 10_000},
                "fabric": {"accelerator": "cpu", "devices": int(ranks), "threads": 1},
                "client_execution": executor,
                "callbacks": [],
            }
        )
        with processes(recipe, folder / "run", resume=False):
            loop = build(recipe, folder / "run")
            watch = Times()
            loop.callbacks.append(watch)
            summary = loop.run()
    steps = sum(
        -(-loop.clients[client].samples // jobs.BATCH) for record in loop.history for client in record["cohort"]
    )
    sent = summary["communication"]
    print(
        json.dumps(
            {
                "times": watch.times,
                "steps": steps,
                "accuracy": summary["metrics"]["student/test/accuracy"],
                "peak": jobs.peak_bytes(),
                "bytes": sent["upload_bytes"] + sent["download_bytes"],
            }
        )
    )


if __name__ == "__main__":
    main()
