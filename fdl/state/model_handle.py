"""Cached access to a model's tensors, for models that are loaded and read for every client of every round.

Walking over a model's submodules costs more than copying a small model. A handle caches the result of the walk: the
state by name, as one vector where that is possible, and the list of parameters. It lives as long as its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fdl.state.flat_tensors import FlatTensors, flatten_module_

_ATTRIBUTE = "_fdl_handle"


class ModelHandle:
    """A model's state and parameters, looked up once, and again whenever a tensor has been replaced.

    A module may be moved, converted, or given other parameters or submodules at any time: the next use of its handle
    detects this and looks everything up again. Copies of a module have no handle.

    Args:
        module: the model; as long as it lives, `ModelHandle.of` finds this handle. Its tensors are moved into one
            vector if possible, which does not change their values.

    Attributes:
        writable: False while the model is shared and not borrowed; then `load` raises.
    """

    def __init__(self, module: nn.Module):
        self._attach(module)
        self.writable = True
        self._look_up()

    def _attach(self, module: nn.Module) -> None:
        self._module = ref(module)  # the module owns the handle: a cycle would keep it on the device for longer
        module.__dict__[_ATTRIBUTE] = self

    @staticmethod
    def of(module: nn.Module) -> ModelHandle | None:
        """Return the handle of a module, None if it has none."""
        handle = module.__dict__.get(_ATTRIBUTE)
        return handle if handle is not None and handle._module() is module else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Exclude the handle from copies and pickles of its module, which have other tensors."""
        return type(None), ()

    @property
    def module(self) -> nn.Module:
        """The model.

        Raises:
            ReferenceError: the model no longer exists.
        """
        module = self._module()
        if module is None:
            raise ReferenceError("the model of this handle is gone")
        return module

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Live references to the model's tensors by name, without those that it declares `frozen`."""
        self._refresh()
        return self._state if isinstance(self._state, FlatTensors) else dict(self._state)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters; a shared one is listed once."""
        self._refresh(moved=False)  # a parameter stays the same object where its memory is replaced
        return self._parameters

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that currently require gradients; a shared one is listed once."""
        return [p for p in self.parameters if p.requires_grad]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the model in place, so that optimisers and references to its parameters stay valid.

        Nothing is changed if any tensor does not fit. Values are converted to the model's floating-point type and
        device.

        Args:
            tensors: exactly the names of `state`, with the same shapes.

        Raises:
            ValueError: names are missing or unknown, a shape differs, or one side is floating-point and the other is
                not.
            RuntimeError: the model is shared and not borrowed.
        """
        if not self.writable:
            raise RuntimeError(
                f"this {type(self.module).__name__} is shared by all who use its architecture, and its weights belong "
                "to whoever borrows it; fill it by `with runtime.borrow(architecture, weights) as module:`"
            )
        self._copy(tensors)

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        self._refresh()
        if (
            isinstance(self._state, FlatTensors)
            and isinstance(tensors, FlatTensors)
            and self._state.layout == tensors.layout
        ):
            self._state.buffer.copy_(tensors.buffer.detach())
        else:
            copy_named(self._state, tensors, type(self.module).__name__)

    def _look_up(self) -> None:
        module = self.module
        laid = None if getattr(module, "frozen", ()) else flatten_module_(module)
        self._remember(named_state(module) if laid is None else laid)

    def _remember(self, state: Mapping[str, Tensor]) -> None:
        module = self.module
        self._state, self._parameters = state, list(module.parameters())
        tables = [t for part in module.modules() for t in (part._modules, part._parameters, part._buffers)]
        # live views, so that a comparison costs no call per submodule; most tables are empty, and any() is cheaper
        self._filled, self._empty = [table.values() for table in tables if table], [t for t in tables if not t]
        self._members = list(chain.from_iterable(self._filled))
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _refresh(self, moved: bool = True) -> None:
        """Look up everything again if a tensor or a submodule has been replaced.

        Args:
            moved: also if a tensor has other memory than before, as after `nn.Module.double`.
        """
        members = list(chain.from_iterable(self._filled))
        if (
            len(members) != len(self._members)
            or not all(map(is_, members, self._members))
            or any(self._empty)
            or (moved and list(map(Tensor.data_ptr, self._tensors)) != self._addresses)
        ):
            self._look_up()


class RowHandle(ModelHandle):
    """The handle of a model whose tensors are views of one row in a matrix of several models.

    Args:
        module: the model.
        state: its state, views of the row.
    """

    def __init__(self, module: nn.Module, state: FlatTensors):
        self._attach(module)
        self.writable = True
        self._remember(state)

    def _look_up(self) -> None:
        raise RuntimeError(
            f"this {type(self.module).__name__} is trained side by side with others, so it must stay where it is: it "
            "was moved, converted or given other parameters; do that in a copy of it"
        )


def handle_of(module: nn.Module) -> ModelHandle:
    """Return the handle of a module that was created by `Runtime.create`.

    Args:
        module: the module.

    Raises:
        ValueError: the module has no handle.
    """
    handle = ModelHandle.of(module)
    if handle is None:
        raise ValueError(f"this {type(module).__name__} has no handle: it was not made by Runtime.create")
    return handle


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Collect a module's parameters and persistent buffers by name, as live references, without `frozen` ones.

    Args:
        module: the module; a tensor with several names, such as tied embeddings, is listed under the first.
    """
    frozen, seen, state = getattr(module, "frozen", ()), set(), {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor) or name in frozen:
            continue
        place = value.data_ptr(), value.shape, value.stride()
        if value.data_ptr() and value.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = value
    return state


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Check that tensors can be copied into a model's, and return them in the order of these.

    Args:
        own: the model's tensors by name.
        tensors: the new values by name.
        name: name of the model's class, for the error.

    Raises:
        ValueError: names are missing or unknown, a shape differs, or one side is floating-point and the other is not.
    """
    if own.keys() != tensors.keys():
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        differences = [
            f"{word} {', '.join(map(repr, names))}"
            for word, names in (("missing", missing), ("unknown", extra))
            if names
        ]
        raise ValueError(f"tensors do not fit {name}: {'; '.join(differences)}")
    sources = [tensors[key] for key in own]
    for (key, target), source in zip(own.items(), sources):
        if source.shape != target.shape:
            raise ValueError(f"{key!r} has shape {list(source.shape)}, expected {list(target.shape)}")
        if source.is_floating_point() != target.is_floating_point():
            raise ValueError(f"{key!r} is {source.dtype}, expected {target.dtype}")
    return sources


def copy_named(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy tensors into a model's by name, in place, or nothing if one of them does not fit.

    Args:
        own: the model's tensors by name, the destination.
        tensors: the new values by name.
        name: name of the model's class, for the error.

    Raises:
        ValueError: names are missing or unknown, a shape differs, or one side is floating-point and the other is not.
    """
    sources = check_fit(own, tensors := dict(tensors.items()), name)
    if own:
        with torch.no_grad():
            torch._foreach_copy_(list(own.values()), sources)
