"""The processes of one run, and their collective operations.

Every rank has the server and the data, and trains a part of the clients. Uploads are shared with all ranks, so that
each computes the same student; the private state of a client stays on the rank that holds it.
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
    """Collective operations over host memory; in a single process they cost nothing.

    They use gloo, also on GPUs: messages, states and float64 sums live in host memory. Only gradients are summed by the
    devices' own backend.

    Args:
        fabric: a launched Fabric.
        timeout: seconds that a rank waits for the others, > 0.
        sharded: models are sharded: all ranks train every client together, instead of dividing clients among them.

    Attributes:
        index: this process's rank.
        count: number of ranks.
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
        """Share bytes with all ranks.

        Args:
            data: this rank's bytes; the length may differ between ranks.

        Returns:
            The bytes of every rank, by rank.

        Raises:
            UserError: another rank has ended, or did not arrive within the timeout; so do all collective operations.
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
        """Send bytes to the leader.

        Args:
            data: this rank's bytes; the length may differ between ranks.

        Returns:
            On the leader the bytes of every rank, by rank; empty on the others.
        """
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
            parameters: the same parameters on all ranks; a missing gradient counts as zero.
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
            UserError: on the leader, with the first rank's message.
            SystemExit: on the other ranks, whose errors the leader reports.
            BaseException: this rank's error, if it is unexpected, that is, not a `UserError`.
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
        """Raise an error of sharded training as the loss of another rank, if a collective operation failed.

        Args:
            error: the error that ended the run on this rank.

        Raises:
            UserError: the error came from a collective operation; any other error is left to the caller.
        """
        lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        if self.sharded and lost:
            self._lost(error)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Turn an error of a collective operation in this context into one message about the lost rank."""
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
    """Return the error for processes that did not connect.

    Args:
        error: the error of torch.distributed.
        timeout: seconds that this process has waited.
    """
    return UserError(
        f"fabric: not all processes of the run have come together within {timeout:g} s (fabric.timeout): one of them "
        f"has ended, was never started, or does not reach MASTER_ADDR ({_short(error)})"
    )


def _short(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:160]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
