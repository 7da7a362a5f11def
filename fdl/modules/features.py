"""Capture of the inputs and outputs of a network's submodules, by hooks that exist for one forward pass only.

Permanent hooks would be copied by ``deepcopy`` without the containers they write to, and would slow down every step;
temporary ones cost nothing when nothing is captured.
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
    """List the submodules that match names or globs.

    Args:
        network: network whose submodules are searched.
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
    """Capture the activations of selected submodules while the context is open.

    Args:
        network: network that the caller runs within the context.
        patterns: dotted names of submodules, or globs of them (``"blocks.*"``).

    Yields:
        Name → output, filled by the forward pass. The last output is kept for a submodule that is called more than
        once, and the first tensor for one that returns several. Submodules that match a glob but are not called are
        left out.

    Raises:
        UserError: a pattern matches nothing, or a submodule given by its full name was not called.
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
    """Capture the inputs of a module while the context is open.

    Args:
        module: module that is called within the context.

    Yields:
        A list that receives the first argument of every call.
    """
    seen: list[Tensor] = []
    if torch.compiler.is_compiling():  # hooks cannot be traced, so `forward` itself is wrapped
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
    """Find the classification layer: the last linear layer, or the last convolution if the network has none.

    Args:
        network: network whose layers are searched in the order of definition.
        outputs: required number of outputs; None for any number.

    Returns:
        Dotted name of the layer; None if no layer qualifies.
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
