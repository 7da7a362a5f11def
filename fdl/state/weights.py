"""A module's weights and buffers as named tensors, and back.

Every floating-point tensor is averaged over clients, including the running mean and variance of batch normalisation.
Integer tensors are counters (``num_batches_tracked``) and are never averaged in floating point; the largest client's
count is used for all. Their sum would count the same batches again each round, since every client starts from the
count that it received. Averaged running variances ignore the distance between the clients' means, so group
normalisation suits non-IID federations better.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fdl.state.model_handle import ModelHandle, copy_named, named_state


def state_bytes(module: nn.Module) -> int:
    """Return the number of bytes of `module_state`; of a sharded module, of its full state, which is not gathered."""
    kept = set(module.state_dict()) - set(getattr(module, "frozen", ()))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # tied ones once
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name in kept)


def module_state(module: nn.Module) -> Mapping[str, Tensor]:
    """Return a module's parameters and persistent buffers by name, to be read before the module changes.

    Names that the module lists as `frozen` (parts of its state that come from public weights and never change) are left
    out, so that neither messages nor checkpoints carry a backbone that every participant has. A tensor with several
    names, such as tied embeddings, is listed under the first.

    The tensors are views of the module's current memory, detached from the graph: do not write to them, and copy those
    that must outlast the module's next training or loading. Do not rely on their following the module, either: those of
    a sharded module are gathered in host memory, a collective operation that all ranks must call together.

    Args:
        module: any module; those of `Runtime.create` have a `ModelHandle`, which saves the walk over it.
    """
    handle = ModelHandle.of(module)
    return named_state(module) if handle is None else handle.state


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that currently require gradients; a shared one is listed once."""
    handle = ModelHandle.of(module)
    return [p for p in module.parameters() if p.requires_grad] if handle is None else handle.trainable


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module in place, so that optimisers and references to its parameters stay valid.

    Nothing is changed if any tensor does not fit. Values are converted to the module's floating-point type and device.

    Args:
        module: the destination.
        tensors: exactly the names of `module_state`, with the same shapes.

    Raises:
        ValueError: names are missing or unknown, a shape differs, or one side is floating-point and the other is not.
        RuntimeError: the module is an architecture's shared one and not borrowed.
    """
    handle = ModelHandle.of(module)
    if handle is None:
        copy_named(named_state(module), tensors, type(module).__name__)
    else:
        handle.load(tensors)


def count_parameters(module: nn.Module) -> int:
    """Count the scalars of a module's parameters, shared ones once, without buffers."""
    return sum(parameter.numel() for parameter in module.parameters())
