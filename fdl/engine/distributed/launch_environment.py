"""The launcher of this process, found by environment variables. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from fdl.errors import UserError


@dataclass(frozen=True)
class Launch:
    """The launch of this process as one of several.

    Attributes:
        by: name of the launcher; empty if LOCAL_RANK and WORLD_SIZE are set directly, as for fdl's own processes.
        is_leader: True in the process of rank 0.
        processes: number of processes started.
        local: number of them on this machine; None if unknown.
        nodes: number of machines; None if unknown.
    """

    by: str
    is_leader: bool
    processes: int
    local: int | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class _Variables:
    """The environment variables of a launcher that the fields of `Launch` come from, and its options for them."""

    rank: str
    processes: str
    local: str
    nodes: str
    options: str

    def read(self, by: str, given: Mapping[str, str]) -> Launch:
        """Read the launch from an environment.

        Args:
            by: name of the launcher.
            given: the environment variables.
        """
        local, nodes = _number(given, self.local), _number(given, self.nodes)
        return Launch(by, given.get(self.rank, "0") in ("", "0"), _number(given, self.processes) or 1, local, nodes)


_KNOWN = {
    "torchrun": _Variables(
        "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "--nproc_per_node={0} --nnodes={1}"
    ),
    "srun": _Variables(
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_NTASKS_PER_NODE",
        "SLURM_NNODES",
        "--ntasks-per-node={0} --nodes={1}",
    ),
    "mpirun": _Variables(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "", "-np {2} --npernode {0}"
    ),
}
_NO_STEP = 0xFFFFFFF0
"""Smallest number that Slurm gives to a step that srun did not start, such as a batch script."""

_OF_STEP = {
    "SLURM_NTASKS": "SLURM_STEP_NUM_TASKS",
    "SLURM_NNODES": "SLURM_STEP_NUM_NODES",
    "SLURM_NODELIST": "SLURM_STEP_NODELIST",
}
"""Variables that may count all of a job's reserved tasks, and those that count the tasks of this srun."""


def launched() -> Launch | None:
    """Return the launch of this process as one of several, None if it was started on its own.

    torchrun is checked first, since srun may have started it. Slurm's counts of reserved tasks apply only to processes
    that srun has started: a batch script has the same variables, and so have the processes that it starts.
    """
    given = os.environ
    if "TORCHELASTIC_RUN_ID" in given:
        return _KNOWN["torchrun"].read("torchrun", given)
    if _inside_step() and (found := _KNOWN["srun"].read("srun", {**given, **_step_variables()})).processes > 1:
        return found
    if "OMPI_COMM_WORLD_RANK" in given and (found := _KNOWN["mpirun"].read("mpirun", given)).processes > 1:
        return found
    if "LOCAL_RANK" in given and (count := _number(given, "WORLD_SIZE") or 1) > 1:
        return Launch("", not _any_set("LOCAL_RANK", "NODE_RANK", "RANK"), count)
    return None


def inside_allocation() -> bool:
    """Return True if Slurm has reserved tasks, and srun did not start this process."""
    found = launched()
    return "SLURM_NTASKS" in os.environ and (found is None or found.by == "")


def export_srun_variables() -> None:
    """Set the variables that Lightning reads, the job's reserved tasks, to the tasks that this srun has started.

    Without this, Lightning rejects ``srun --ntasks=4`` without ``--ntasks-per-node``, and steps on a part of a job.
    """
    if _inside_step():
        os.environ.update(_step_variables())


def is_follower() -> bool:
    """Return True if another process, on this or another machine, leads this run and writes its output."""
    found = launched()
    return _any_set("LOCAL_RANK", "NODE_RANK", "RANK") if found is None else not found.is_leader


def started_by_others() -> bool:
    """Return True if an external launcher, such as torchrun or Slurm, has started this process as one of several."""
    found = launched()
    return found is not None and found.processes > 1


def check_world_size(devices: int, nodes: int) -> None:
    """Check the number of launched processes against a recipe.

    Args:
        devices: the recipe's number of devices per machine.
        nodes: the recipe's number of machines.

    Raises:
        UserError: an external launcher has started another number; raised in all processes, so that none waits.
    """
    found = launched()
    if found is None:
        return
    if found.by == "mpirun" and find_spec("mpi4py") is None:
        raise UserError("fabric: mpirun has started this process, and Lightning needs mpi4py to know which one it is")
    fits = found.processes == devices * nodes
    if fits and found.local in (None, devices) and found.nodes in (None, nodes):
        return
    asked = f"fabric.devices={devices} and fabric.num_nodes={nodes} ask for {_shape(devices * nodes, devices)}"
    if not found.by:
        raise UserError(f"{asked}, but WORLD_SIZE is {found.processes}; it must be their product")
    local = found.local or found.processes
    machines = found.nodes or max(1, found.processes // local)
    options = _KNOWN[found.by].options.format(devices, nodes, devices * nodes)
    raise UserError(
        f"{asked}, but {found.by} has started {_shape(found.processes, local)}; set fabric.devices={local} "
        f"fabric.num_nodes={machines}, or start {found.by} with {options}"
    )


def _shape(processes: int, local: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}, {local} on a machine"


def _inside_step() -> bool:
    """Return True if srun has started this process, and not as an interactive shell."""
    step = _number(os.environ, "SLURM_STEP_ID")
    started = (step is not None and step < _NO_STEP) or _any_set("SLURM_PROCID")
    return started and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _step_variables() -> dict[str, str]:
    """Return srun's counts of its own tasks, under the names of the job's."""
    counts = {name: os.environ[own] for name, own in _OF_STEP.items() if os.environ.get(own)}
    if even := re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts["SLURM_NTASKS_PER_NODE"] = even[1]
    return counts


def _number(given: Mapping[str, str], name: str) -> int | None:
    return int(given[name]) if given.get(name, "").isdigit() else None


def _any_set(*names: str) -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in names)
