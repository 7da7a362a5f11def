"""Tasks of test_launch_environment.py: ``python tests/cluster_jobs.py FOLDER RANK PORT``, as srun starts them.

The same small federation as one machine of two tasks, and as two machines of one; then what must not work.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from fdl.__main__ import main

FIT = ["fit", "--recipe", "recipes/digits/fedavg.yaml", "fabric.accelerator=cpu", "fabric.timeout=60", "callbacks=[]"]
SMALL = ["federation.clients=3", "federation.rounds=2", "local_training.steps=3", "data.args.proxy=64"]
COUNTS = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
PART = {
    "SLURM_NODELIST": "elsewhere[1-4]",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
NO_STEP = "4294967291"  # of a batch script


def slurm(port: int, *counts: int | None, step: str = "0") -> dict[str, str]:
    """The variables of a task that srun has started, on this machine; Lightning makes the port of the job's number."""
    names = {"SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NAME": "fdl"}
    numbers = {"SLURM_JOB_ID": f"77{port - 15000:04d}", "SLURM_STEP_ID": step}
    return names | numbers | {name: str(count) for name, count in zip(COUNTS, counts) if count is not None}


def one_task(port: int, counts: tuple[int | None, ...], folder: Path, *overrides: str, **more: str) -> tuple[int, str]:
    """Run one task's command; its exit code, and what it says of errors."""
    for name in list(os.environ):  # Lightning leaves some there
        if name.startswith(("SLURM_", "MASTER_")):
            del os.environ[name]
    os.environ.update({**slurm(port, *counts), **more})
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main([*FIT, *SMALL, "--output-dir", str(folder), *overrides])
    if dist.is_initialized():
        dist.destroy_process_group()
    return code, said.getvalue()


if __name__ == "__main__":
    place, rank, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ends = {
        "one machine": one_task(first, (2, 2, 1, rank, rank, 0), place / "one", "fabric.devices=2"),
        "part of a job": one_task(first + 2, (8, None, 4, rank, rank, 0), place / "part", "fabric.devices=2", **PART),
        "two machines": one_task(first + 1, (2, 1, 2, rank, 0, rank), place / "two", "fabric.num_nodes=2"),
        "one process asked": one_task(first, (2, 2, 1, rank, rank, 0), place / "fewer"),
        "other machines asked": one_task(first, (2, 2, 1, rank, rank, 0), place / "other", "fabric.num_nodes=2"),
        "another run's folder": one_task(first, (2, 2, 1, rank, rank, 0), place / "one", "fabric.devices=2", "seed=5"),
    }
    if rank == 0:
        ends["nobody else"] = one_task(
            first + 3, (2, 2, 1, 0, 0, 0), place / "alone", "fabric.devices=2", "fabric.timeout=2"
        )
    (place / f"ends-{rank}.json").write_text(json.dumps(ends))
