"""A module's weights and buffers as named tensors, and back.

What is averaged over clients: every floating-point tensor, which includes the running mean and variance of batch
normalisation. Integer tensors are counters (``num_batches_tracked``) and are never averaged in floating point; the
largest client's count stands for all. Their sum would count the same batches again each round, since every client
starts from the count it was sent. Averaged running variances leave out how far the clients' means lie apart, so
group normalisation serves non-IID federations better.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fdl.state.model_handle import ModelHandle, copy_named, named_state


def state_bytes(module: nn.Module) -> int:
    """Return the number of bytes of `module_state`, of the whole module where ranks share it, without gathering it."""
    kept = set(module.state_dict()) - set(getattr(module, "frozen", ()))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # tied ones once
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name in kept)


def module_state(module: nn.Module) -> Mapping[str, Tensor]:
    """Return a module's parameters and persistent buffers by name, to be read before the module changes.

    Left out is what the module itself calls `frozen` (names in its state that come from public weights and never
    change), so that neither messages nor checkpoints carry a backbone that everybody has. A tensor that has several
    names, as tied embeddings have, goes by the first.

    The tensors are a view of the module as it is now, detached from the graph: nothing may be written to them, and
    they are good until the module is next trained or filled, so copy what must outlast that. Nobody may
    rely on their following the module, either: those of a module that is spread over ranks are gathered in host memory,
    a collective operation for which all ranks must call this together.

    Args:
        module: any module; those of `Runtime.create` have a `ModelHandle`, which saves the walk over it.
    """
    handle = ModelHandle.of(module)
    return named_state(module) if handle is None else handle.state


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients now, shared ones once."""
    handle = ModelHandle.of(module)
    return [p for p in module.parameters() if p.requires_grad] if handle is None else handle.trainable


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module in place, so that optimisers and references to its parameters stay valid.

    Nothing is changed when anything does not fit. Values are converted to the module's floating-point type and device.

    Args:
        module: the destination.
        tensors: exactly the names of `module_state`, with the same shapes.

    Raises:
        ValueError: names are missing or left over, a shape differs, or one side is floating-point and the other is
            not.
        RuntimeError: the module is shared by an architecture's users, and nobody has borrowed it.
    """
    handle = ModelHandle.of(module)
    if handle is None:
        copy_named(named_state(module), tensors, type(module).__name__)
    else:
        handle.load(tensors)


def count_parameters(module: nn.Module) -> int:
    """Return the number of scalars among a module's parameters, shared ones once; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())
