"""A module's weights and buffers as named tensors, and back.

What is averaged over clients: every floating-point tensor, which includes the running mean and variance of batch
normalisation. Integer tensors are counters (``num_batches_tracked``) and are never averaged in floating point; the
largest client's count stands for all. Their sum would count the same batches again each round, since every client
starts from the count it was sent. Averaged running variances leave out how far the clients' means lie apart, so
group normalisation serves non-IID federations better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from fdl.state.flat_tensors import FlatTensors, lay_side_by_side
from fdl.state.shards import local, part_for, to_host

_PINNED: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_LAID: WeakKeyDictionary[nn.Module, FlatTensors] = WeakKeyDictionary()
_PINNED_PARAMETERS: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()
_IN_PARTS: WeakSet[nn.Module] = WeakSet()


def state_bytes(module: nn.Module) -> int:
    """Return how many bytes `module_state` has, of the whole module where ranks share it, without gathering it."""
    kept = set(module.state_dict()) - set(getattr(module, "frozen", ()))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # tied ones once
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name in kept)


def module_state(module: nn.Module) -> Mapping[str, Tensor]:
    """Return a module's parameters and persistent buffers by name.

    Left out is what the module itself calls `frozen` (names in its state that come from public weights and never
    change), so that neither messages nor checkpoints carry a backbone that everybody has. A tensor that has several
    names, as tied embeddings have, goes by the first.

    The tensors are references into the module, detached from the graph: copy them before the module trains on. Of a
    module that is spread over ranks they are copies in host memory, which all ranks must ask for together.
    """
    if (laid := _LAID.get(module)) is not None:
        return laid
    known = _PINNED.get(module)
    if known is not None and module in _IN_PARTS:
        return {name: to_host(tensor) for name, tensor in known.items()}
    if known is not None:
        return dict(known)
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


def pin(module: nn.Module) -> None:
    """Look a module's tensors up once and for all: from now on they change in place only.

    A template is filled and read for every client of every round, and walking over its submodules costs more than
    copying a small model.

    Args:
        module: it must not be moved, converted or given other parameters afterwards.
    """
    _LAID.pop(module, None)
    _PINNED.pop(module, None)
    laid = None if getattr(module, "frozen", ()) else lay_side_by_side(module)
    if laid is None:
        _PINNED[module] = module_state(module)
    else:
        _LAID[module] = laid
    _PINNED_PARAMETERS[module] = list(module.parameters())


def pin_to(module: nn.Module, state: FlatTensors) -> None:
    """As `pin`, for a module whose tensors lie side by side already.

    Args:
        module: it must not be moved, converted or given other parameters afterwards.
        state: its state, views of one vector.
    """
    _LAID[module] = state
    _PINNED_PARAMETERS[module] = list(module.parameters())


def pin_parts(module: nn.Module, names: Iterable[str]) -> None:
    """As `pin`, for a module of which this rank holds a part.

    Args:
        module: already sharded.
        names: of its state, when it was whole: what is shared cannot be told from its parts.
    """
    state = module.state_dict()
    _PINNED[module] = {name: state[name] for name in names}
    _PINNED_PARAMETERS[module] = list(module.parameters())
    _IN_PARTS.add(module)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for gradients now, shared ones once."""
    parameters = _PINNED_PARAMETERS.get(module)
    return [p for p in (module.parameters() if parameters is None else parameters) if p.requires_grad]


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module in place, so that optimisers and references to its parameters stay valid.

    Nothing is changed when anything does not fit. Values are converted to the module's floating-point type and device.

    Args:
        module: filled.
        tensors: exactly the names of `module_state`, with the same shapes.

    Raises:
        ValueError: names are missing or left over, a shape differs, or one side is floating-point and the other not.
    """
    laid = _LAID.get(module)
    if laid is not None and isinstance(tensors, FlatTensors) and laid.form == tensors.form:
        laid.whole.copy_(tensors.whole.detach())
        return
    own = _PINNED[module] if module in _IN_PARTS else module_state(module)
    tensors = dict(tensors.items())
    if own.keys() != tensors.keys():
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        said = [
            f"{word} {', '.join(map(repr, names))}"
            for word, names in (("missing", missing), ("unknown", extra))
            if names
        ]
        raise ValueError(f"tensors do not fit {type(module).__name__}: {'; '.join(said)}")
    sources = [tensors[name] for name in own]
    for (name, target), source in zip(own.items(), sources):
        if source.shape != target.shape:
            raise ValueError(f"{name!r} has shape {list(source.shape)}, expected {list(target.shape)}")
        if source.is_floating_point() != target.is_floating_point():
            raise ValueError(f"{name!r} is {source.dtype}, expected {target.dtype}")
    if module in _IN_PARTS:
        sources = [part_for(target, source) for target, source in zip(own.values(), sources)]
        own = {name: local(target) for name, target in own.items()}
    if own:
        with torch.no_grad():
            torch._foreach_copy_(list(own.values()), sources)


def count_parameters(module: nn.Module) -> int:
    """Return the number of scalars among a module's parameters, shared ones once; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())
