"""Who has started this process, by what launchers leave in its environment. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from fdl.errors import UserError


@dataclass(frozen=True)
class Launch:
    """What started this process as one of several.

    Attributes:
        by: its name; empty where somebody has set LOCAL_RANK and WORLD_SIZE, as fdl does for processes of its own.
        is_leader: whether this is the process that leads.
        processes: how many it has started.
        local: how many of them on this machine; None where it does not say.
        nodes: on how many machines; likewise.
    """

    by: str
    is_leader: bool
    processes: int
    local: int | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class _Variables:
    """The names under which a launcher leaves what `Launch` says, and its own options for them."""

    rank: str
    processes: str
    local: str
    nodes: str
    options: str

    def read(self, by: str, given: Mapping[str, str]) -> Launch:
        """What they say."""
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
"""Slurm numbers what is no step started by srun, such as a batch script, from here on."""

_OF_STEP = {
    "SLURM_NTASKS": "SLURM_STEP_NUM_TASKS",
    "SLURM_NNODES": "SLURM_STEP_NUM_NODES",
    "SLURM_NODELIST": "SLURM_STEP_NODELIST",
}
"""What may count all that a job has reserved, and what counts the tasks of this srun."""


def launched() -> Launch | None:
    """What has started this process as one of several, None where nothing has.

    torchrun comes first, since srun may have started it. What Slurm says of reserved tasks holds for those processes
    alone that srun has started: a batch script has the same variables, and so have the processes that it starts.
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
    """Whether Slurm has reserved tasks, and this process is none that it has started."""
    found = launched()
    return "SLURM_NTASKS" in os.environ and (found is None or found.by == "")


def export_srun_variables() -> None:
    """Tell Lightning, which reads what a job has reserved, which tasks this srun has started.

    Without it ``srun --ntasks=4`` is refused for want of ``--ntasks-per-node``, and so is a step of a part of a job.
    """
    if _inside_step():
        os.environ.update(_step_variables())


def is_follower() -> bool:
    """Whether another process leads this run, on this machine or on another one, and so talks to people."""
    found = launched()
    return _any_set("LOCAL_RANK", "NODE_RANK", "RANK") if found is None else not found.is_leader


def started_by_others() -> bool:
    """Whether a launcher outside, such as torchrun or Slurm, has started this process as one of several."""
    found = launched()
    return found is not None and found.processes > 1


def check_world_size(devices: int, nodes: int) -> None:
    """Compare the processes that there are with those that a recipe asks for.

    Args:
        devices: on each machine.
        nodes: machines.

    Raises:
        UserError: a launcher outside has started others than these; all processes say so, and none waits.
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
    """Whether srun has started this process, and not for a shell to work in."""
    step = _number(os.environ, "SLURM_STEP_ID")
    started = (step is not None and step < _NO_STEP) or _any_set("SLURM_PROCID")
    return started and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _step_variables() -> dict[str, str]:
    """What srun says of its own tasks, under the names of the job's."""
    said = {name: os.environ[own] for name, own in _OF_STEP.items() if os.environ.get(own)}
    if even := re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        said["SLURM_NTASKS_PER_NODE"] = even[1]
    return said


def _number(given: Mapping[str, str], name: str) -> int | None:
    return int(given[name]) if given.get(name, "").isdigit() else None


def _any_set(*names: str) -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in names)
