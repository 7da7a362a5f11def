"""Cached access to the tensors of a sharded model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fdl.state.model_handle import ModelHandle, check_fit
from fdl.state.shards import full_tensor_cpu, local_shard, shard_like


class ShardedModelHandle(ModelHandle):
    """A sharded model's state, as full tensors in host memory, and its local shards, which are looked up once.

    While a block is gathered, torch temporarily replaces its shards by other parameters, so nothing is looked up again.

    Args:
        module: already sharded.
        names: names of the state before sharding: shared tensors cannot be recognised afterwards.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self._attach(module)
        self.writable = True
        state = module.state_dict()
        self._remember({name: state[name] for name in names})

    def _refresh(self, moved: bool = True) -> None:
        pass

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Full copies in host memory by name; a collective operation, which all ranks must run together."""
        return {name: full_tensor_cpu(tensor) for name, tensor in self._state.items()}

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        sources = check_fit(self._state, tensors := dict(tensors.items()), type(self.module).__name__)
        sources = [shard_like(target, source) for target, source in zip(self._state.values(), sources)]
        if sources:
            with torch.no_grad():
                torch._foreach_copy_([local_shard(target) for target in self._state.values()], sources)
