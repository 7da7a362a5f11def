"""What passes through a network's submodules, seen by hooks that live for one forward pass only.

Hooks that stay would be copied by ``deepcopy`` without what they write to, and would cost every step; these cost
nothing when no one asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.utils.suggest import suggest


def matching_submodules(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """List the submodules that names or globs choose.

    Args:
        network: where to look.
        patterns: dotted names as in ``network.named_modules()``, or globs of them (``"blocks.*"``; a ``*`` also
            spans dots).

    Returns:
        Dotted names in the network's own order, each once.

    Raises:
        UserError: a pattern matches no submodule.
    """
    known = [name for name, _ in network.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(f"features: no submodule matches {pattern!r}{suggest(pattern, known)}")
        chosen.update(found)
    return [name for name in known if name in chosen]


@contextmanager
def capture(network: nn.Module, patterns: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the activations of chosen submodules while the context is open.

    Args:
        network: called within the context by the caller.
        patterns: as in `matching_submodules`.

    Yields:
        Name → output, filled by the forward pass. Of a submodule that is called more than once the last output is
        kept, of one that returns several tensors the first. A submodule that a glob matches but that the network
        does not call is left out.

    Raises:
        UserError: a pattern matches nothing, or a submodule chosen by its full name was not called.
    """
    names = matching_submodules(network, patterns)
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:
                seen[name] = tensor

        return keep

    handles = [network.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        yield seen
        for name in patterns:
            if name in names and name not in seen:
                raise UserError(f"features: {name!r} returned no tensor in the forward pass; it may not be called")
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what a module is called with while the context is open.

    Yields:
        A list that receives the first argument of every call.
    """
    seen: list[Tensor] = []
    if torch.compiler.is_compiling():  # hooks cannot be traced, so the call itself is stood in for
        forward = module.forward

        def keep(*inputs: Any) -> Any:
            seen.append(inputs[0])
            return forward(*inputs)

        module.__dict__["forward"] = keep
        try:
            yield seen
        finally:
            del module.__dict__["forward"]
        return
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def last_layer(network: nn.Module, outputs: int | None = None) -> str | None:
    """Find the classification layer: the last linear layer, or the last convolution where there is none.

    Args:
        network: where to look, in the order of definition.
        outputs: how many outputs it must have; None takes any number.

    Returns:
        Its dotted name, None when there is no such layer.
    """
    sizes = {nn.Linear: "out_features", nn.Conv2d: "out_channels"}
    for kind, size in sizes.items():
        names = [
            name
            for name, module in network.named_modules()
            if isinstance(module, kind) and outputs in (None, getattr(module, size))
        ]
        if names:
            return names[-1]
    return None


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((found for item in output if (found := _first_tensor(item)) is not None), None)
    return None
