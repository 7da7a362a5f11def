"""The processes of one run, and their collective operations.

Every rank has the server and the data, and trains a part of the clients. What clients send is handed to all ranks, so
that each of them comes to the same student by itself; what is only one client's stays with the rank that has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fdl.errors import UserError
from fdl.state.flat_tensors import flat_view

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn


class ProcessGroup:
    """Collective operations over host memory; in a single process all of them are free.

    They run over gloo, on GPUs too: messages, states and float64 sums live in host memory. Only gradients take the
    devices' own way.

    Args:
        fabric: launched.
        timeout: seconds that a rank waits for the others, > 0.
        sharded: all ranks do all the work, each with its part of every model, instead of sharing clients out.

    Attributes:
        index: this process's rank.
        count: how many there are.
    """

    def __init__(self, fabric: Fabric, timeout: float, sharded: bool = False):
        self.index, self.count, self._timeout = fabric.global_rank, fabric.world_size, timeout
        self.sharded = sharded
        self._group = None
        if self.count > 1:
            with self._peers():
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def leader(self) -> bool:
        """True on the rank that writes files and logs."""
        return self.index == 0

    @property
    def evaluates_server(self) -> bool:
        """True on the rank that evaluates the server's models: the leader, or all ranks where models are sharded."""
        return self.leader or self.sharded

    def gather(self, data: bytes) -> list[bytes]:
        """Hand bytes to all ranks.

        Args:
            data: this rank's; of any length, which may differ.

        Returns:
            What every rank gave, by rank.

        Raises:
            UserError: another rank is gone, or did not come within the timeout; likewise below.
        """
        if self.count == 1:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with self._peers():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
            longest = max(int(size) for size in sizes)
            own = torch.zeros(longest, dtype=torch.uint8)
            own[: len(data)] = _tensor(data)
            every = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(every, own, group=self._group)
        return [some[: int(size)].numpy().tobytes() for some, size in zip(every, sizes)]

    def collect(self, data: bytes) -> list[bytes]:
        """Hand bytes to the leader: what every rank gave, by rank; nothing on the others."""
        if self.count == 1:
            return [data]
        with self._peers():
            if not self.leader:
                dist.send(torch.tensor([len(data)]), 0, group=self._group)
                dist.send(_tensor(data), 0, group=self._group)
                return []
            every = [data]
            for rank in range(1, self.count):
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, rank, group=self._group)
                some = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(some, rank, group=self._group)
                every.append(some.numpy().tobytes())
            return every

    def any(self, flag: bool) -> bool:
        """Return True if a flag is set on any rank."""
        return bool(self.max_number(int(flag)))

    def max_number(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.count == 1:
            return number
        value = torch.tensor([number])
        with self._peers():
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor in host memory by its sum over ranks."""
        if self.count > 1 and tensor.numel():
            with self._peers():
                dist.all_reduce(tensor, group=self._group)

    def max_(self, tensor: Tensor) -> None:
        """Replace a tensor in host memory by its elementwise maximum over ranks."""
        if self.count > 1 and tensor.numel():
            with self._peers():
                dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients of a model that all ranks train by their sums, in one operation per dtype.

        Args:
            parameters: the same on all ranks; without a gradient where nothing asked for one.
        """
        with self._peers():
            for dtype in dict.fromkeys(p.dtype for p in parameters):
                some = [p for p in parameters if p.dtype == dtype]
                for p in some:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                whole = flat_view([p.grad for p in some])
                if whole is not None:
                    dist.all_reduce(whole)
                    continue
                whole = torch.cat([p.grad.reshape(-1) for p in some])
                dist.all_reduce(whole)
                parts = whole.split([p.numel() for p in some])
                torch._foreach_copy_([p.grad for p in some], [part.view_as(p) for part, p in zip(parts, some)])

    def raise_on_any_failure(self, error: BaseException | None, messages: Sequence[str]) -> None:
        """End the run on all ranks if it failed on one.

        Args:
            error: this rank's error, None if there is none.
            messages: the error text of every rank, by rank; empty if there is none.

        Raises:
            UserError: on the leader, with what happened.
            SystemExit: on a rank whose error the leader tells.
            BaseException: the error itself, where it is one that nobody expected.
        """
        if not any(messages):
            return
        rank = next(i for i, text in enumerate(messages) if text)
        if error is not None and (self.leader or not isinstance(error, UserError)):
            raise error
        if self.leader:
            raise UserError(f"{messages[rank]} (on rank {rank})")
        sys.exit(2)

    def wrap_lost_peer(self, error: BaseException) -> None:
        """Turn an error in the midst of sharded training into one that says that another rank is gone.

        Args:
            error: what ended the run here.

        Raises:
            UserError: the error came from a collective operation; any other error is left to the caller.
        """
        lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        if self.sharded and lost:
            self._lost(error)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Say in one message that another rank is gone."""
        try:
            yield
        except RuntimeError as error:  # torch's DistBackendError is one, too
            self._lost(error)

    def _lost(self, error: RuntimeError) -> NoReturn:
        text = _short(error)
        raise UserError(
            f"rank {self.index} of {self.count}: another process of this run has ended or did not answer within "
            f"{self._timeout:g} s (fabric.timeout); its own message says why. The run can go on from its last "
            f"checkpoint with --resume ({text})"
        ) from error


def missing_processes_error(error: RuntimeError, timeout: float) -> UserError:
    """What to tell somebody whose processes did not find each other."""
    return UserError(
        f"fabric: not all processes of the run have come together within {timeout:g} s (fabric.timeout): one of them "
        f"has ended, was never started, or does not reach MASTER_ADDR ({_short(error)})"
    )


def _short(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:160]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
