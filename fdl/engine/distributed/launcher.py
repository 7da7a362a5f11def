"""Launcher of a run's other processes, one per device of this machine, which end with the run.

Processes started by Lightning's own launcher run the command line again, which would restart a comparison, and when one
of them dies, the others are killed without a message.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from fdl.engine.distributed.devices import NO_SUCH_DEVICES, fabric_of, require_gpus
from fdl.engine.distributed.launch_environment import launched
from fdl.errors import UserError

if TYPE_CHECKING:
    from fdl.recipe.config import Recipe

GRACE = 10.0
"""Seconds for a process to end by itself, with its own message, once another one has failed."""


@contextmanager
def processes(recipe: Recipe, folder: Path, resume: bool) -> Iterator[None]:
    """Run a recipe in the other processes of this machine, if it uses several devices, for the length of this context.

    Args:
        recipe: the recipe, with its number of devices and machines.
        folder: the run's folder.
        resume: True if the run resumes from a checkpoint.

    Raises:
        UserError: the machine lacks the recipe's devices or GPUs, or the address for a run over several machines is
            not set.
    """
    require_gpus(recipe)
    single = str(recipe.fabric.devices) == "1" and recipe.fabric.num_nodes == 1
    try:
        if single or launched() is not None:  # the build checks the number of launched processes
            yield
            return
        own = {key: value for key, value in vars(recipe.fabric).items() if key != "threads"}
        try:
            count = len(getattr(fabric_of(**own).strategy, "parallel_devices", None) or [None])
        except NO_SUCH_DEVICES:
            count = 0  # the build raises with the reason
        if count * recipe.fabric.num_nodes <= 1:
            yield
            return
        folders = tempfile.TemporaryDirectory(prefix="fdl-")
        with _environment(recipe, count), folders as place:
            file = Path(place) / "recipe.yaml"
            file.write_text(recipe.to_yaml(), encoding="utf-8")
            command = [sys.executable, "-m", "fdl", "fit", "--recipe", f"{file}", "--output-dir", f"{folder}"]
            with _Children([*command, *(["--resume"] if resume else [])], range(1, count)):
                yield
    finally:
        if dist.is_initialized() and launched() is None:
            dist.destroy_process_group()


@contextmanager
def _environment(recipe: Recipe, count: int) -> Iterator[None]:
    """Set the variables by which the processes of a run connect, for the length of this context."""
    nodes, before = recipe.fabric.num_nodes, dict(os.environ)
    if nodes > 1 and (missing := [n for n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if n not in os.environ]):
        raise UserError(
            f"fabric.num_nodes: {nodes} machines find each other by {', '.join(missing)}, which are not set; start the "
            "run with torchrun or srun, or set them on every machine"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("NODE_RANK", "0")
    if nodes == 1:
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.update(LOCAL_RANK="0", WORLD_SIZE=str(count * nodes))
    try:
        yield
    finally:
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Children:
    """The processes of the other local ranks, monitored until they or this process end.

    Args:
        command: the command that each of them runs.
        ranks: their local ranks.
    """

    def __init__(self, command: list[str], ranks: range):
        self._over = threading.Event()
        own = {rank: {"LOCAL_RANK": str(rank)} for rank in ranks}
        self._processes = {rank: subprocess.Popen(command, env={**os.environ, **own[rank]}) for rank in ranks}

    def __enter__(self) -> _Children:
        threading.Thread(target=self._watch, name="fdl-ranks", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        deadline = time.monotonic() + GRACE
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            failed = {rank: p.returncode for rank, p in self._processes.items() if p.poll() not in (None, 0)}
            if failed and not self._over.wait(GRACE):
                # this process waits for one that has ended, or runs a long step, which nothing else would interrupt
                rank, code = next(iter(failed.items()))
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                print(
                    f"error: the process of local rank {rank} {how}; stopping the run. It can go on from its last "
                    "checkpoint with --resume",
                    file=sys.stderr,
                    flush=True,
                )
                for process in self._processes.values():
                    process.kill()
                os._exit(2)
