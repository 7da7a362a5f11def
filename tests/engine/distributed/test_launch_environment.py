"""Runs that a launcher outside has started: Slurm, by its variables, and torchrun itself."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fdl.__main__ import main
from fdl.engine.distributed import launch_environment as clusters
from fdl.errors import UserError
from tests.cluster_jobs import FIT, NO_STEP, SMALL, slurm

ROOT = Path(__file__).parents[3]
CHANGES = ("time", "memory", "environment")


def start(*command, **variables):
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {**known, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes)


def both(*processes):
    """What two processes say, once they have ended."""
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_ports(count, low=15000, high=24990):
    """The first of so many ports in a row that nobody has, where Slurm's jobs have theirs."""
    for port in range(low + os.getpid() % 5000, high):
        try:
            for offset in range(count):
                with socket.socket() as some:
                    some.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
    raise OSError("no free ports")


def summary(folder):
    """All that must not depend on who started how many processes."""
    found = json.loads((folder / "summary.json").read_text())
    for record in found["history"]:
        del record["seconds"]
    return {key: value for key, value in found.items() if key not in CHANGES}


def nearly(value):
    """Sums of partial sums agree up to rounding."""
    if isinstance(value, dict):
        return {key: nearly(one) for key, one in value.items()}
    if isinstance(value, list):
        return [nearly(one) for one in value]
    return pytest.approx(value, abs=1e-6) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The summary of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main([*FIT, *SMALL, "fabric.threads=1", "--output-dir", str(folder)]) == 0
    return nearly(summary(folder))


@pytest.fixture(scope="module")
def srun(tmp_path_factory):
    """Where two tasks of Slurm ran, and how each of their commands ended, by task."""
    folder, port = tmp_path_factory.mktemp("slurm"), free_ports(4)
    said = both(*(start("tests/cluster_jobs.py", str(folder), str(rank), str(port)) for rank in (0, 1)))
    assert all((folder / f"ends-{rank}.json").exists() for rank in (0, 1)), "\n".join(said)
    return folder, [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("shape", ["one machine", "two machines", "part of a job"])
def test_tasks_of_slurm_are_one_process(srun, alone, shape):
    """Two tasks on a machine, one on each of two, two of a larger job: ranks and port come from Slurm's variables."""
    folder, ends = srun
    assert [end[shape] for end in ends] == [[0, ""], [0, ""]]
    assert summary(folder / shape.split()[0]) == alone


@pytest.mark.slow
def test_torchrun_on_two_machines_is_one_process(alone, tmp_path):
    """Each machine has its own torchrun; they meet at a fixed address."""
    port = free_ports(1)
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    fit = ["-m", "fdl", *FIT, *SMALL, "fabric.num_nodes=2", "--output-dir", str(tmp_path)]
    run = ["-m", "torch.distributed.run", *where]
    machines = [start(*run, f"--node_rank={rank}", *fit) for rank in (0, 1)]
    said = both(*machines)
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert summary(tmp_path) == alone
    assert "Run folder" in said[0] and "Run folder" not in said[1]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("one process asked", ["fabric.devices=1", "ask for 1 process", "srun has started 2", "fabric.devices=2"]),
        ("other machines asked", ["fabric.num_nodes=2", "2 processes, 1 on", "started 2 processes, 2 on"]),
        ("another run's folder", ["run of another recipe", "seed"]),
    ],
)
def test_no_task_waits_for_one_that_has_ended(srun, end, words):
    """What is wrong for one is wrong for all, and each finds it before it waits for others."""
    folder, ends = srun
    for code, said in (task[end] for task in ends):
        assert code == 2 and said.count("error") == 1 and all(word in said for word in words), said
    assert not (folder / "fewer").exists() and not (folder / "other").exists()


def test_a_task_that_never_comes(srun):
    """The others wait for it as long as the recipe says."""
    code, said = srun[1][0]["nobody else"]
    assert code == 2 and "within 2 s (fabric.timeout)" in said, said


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, and none of another."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TORCHELASTIC_")) or name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
            monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}


def test_torchrun_numbers_the_processes_that_srun_started(environment):
    """Where srun starts torchrun, machines may come in another order than Slurm's."""
    environment(**slurm(15000, 2, 1, 2, 1, 0, 1), **TORCHRUN, RANK="0", LOCAL_RANK="0")
    assert clusters.launched() == clusters.Launch("torchrun", True, 4, 2, 2)
    assert not clusters.is_follower() and clusters.started_by_others() and not clusters.inside_allocation()
    clusters.check_world_size(2, 2)


@pytest.mark.parametrize(("tasks", "local"), [("2(x2)", 2), ("3,1", None)])
def test_a_step_counts_its_own_tasks(environment, tasks, local):
    """Slurm says of a step how many tasks each of its machines has; Lightning looks at what the job has."""
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": tasks}
    environment(**slurm(15000, 16, None, 4, 3, 1, 1), **step)
    assert clusters.launched() == clusters.Launch("srun", False, 4, local, 2)
    environment(SLURM_NTASKS="16", SLURM_NTASKS_PER_NODE="", SLURM_NNODES="4")  # put back after the test
    clusters.export_srun_variables()
    assert [os.environ[f"SLURM_{name}"] for name in ("NTASKS", "NNODES")] == ["4", "2"]
    assert os.environ["SLURM_NTASKS_PER_NODE"] == ("2" if local else "")


def test_reserved_tasks_are_no_processes(environment):
    """In a batch script Slurm's variables count tasks that nobody has started; a shell of srun's is none of them."""
    batch = slurm(15000, 4, 4, 1, 0, 0, 0, step=NO_STEP)
    environment(**batch)
    assert clusters.launched() is None and clusters.inside_allocation() and not clusters.is_follower()
    clusters.check_world_size(4, 1)
    environment(LOCAL_RANK="3", WORLD_SIZE="4")  # as fdl starts others there
    assert (
        clusters.launched() == clusters.Launch("", False, 4) and clusters.inside_allocation() and clusters.is_follower()
    )
    environment(**{**batch, "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "", "WORLD_SIZE": ""})
    assert clusters.launched() is None and clusters.inside_allocation()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**TORCHRUN, "RANK": "3"}, "torchrun has started 4 processes, 2 on a machine; set fabric.devices=2"),
        ({**TORCHRUN, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}, "started 1 process,"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "3"}, "WORLD_SIZE is 3"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
    ],
)
def test_other_processes_than_asked(environment, monkeypatch, variables, words):
    """Half of what is asked would wait for the other half; twice as many would run twice."""
    monkeypatch.setattr(clusters, "find_spec", lambda name: name)
    environment(**variables)
    with pytest.raises(UserError, match=words) as told:
        clusters.check_world_size(4, 1)
    assert "fabric.devices=4" in str(told.value)


def test_mpirun_needs_its_python_package(environment, monkeypatch):
    """Without it every process would take itself for the first."""
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    environment(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")
    with pytest.raises(UserError, match="mpi4py"):
        clusters.check_world_size(2, 1)
