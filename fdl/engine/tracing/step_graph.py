"""A training step as a list of tensor operations, forward and backward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

log = logging.getLogger("fdl")

Results = tuple[dict[str, Tensor], list[Tensor]]
"""Named losses, and gradients."""

StepFunction = Callable[..., Results]
"""A function of tensors alone, by position."""

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default)

_SAME = {
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.view.default,
    aten._unsafe_view.default,
}
"""Operations without effect if the result has the shape of the argument."""


def trace_step(
    step: StepFunction, tensors: Sequence[Tensor], expected: Results, own: Sequence[Tensor]
) -> StepFunction | None:
    """Trace a step.

    Args:
        step: the step; it changes none of its arguments.
        tensors: its arguments.
        expected: its results for these arguments.
        own: all other tensors that it may read, whose contents may change between two steps.

    Returns:
        A function with the same results, whose gradients have the same layout or are contiguous; None if the step
        cannot be traced: it draws random numbers, depends on values of tensors, or is not reproduced to the bit.
    """
    try:
        module = make_fx(step)(*tensors)
        _check(module, own)
        _simplify(module.graph)
        found = torch.no_grad()(_as_function(module))
        again = found(*tensors)
        before, after = ([*losses.values(), *gradients] for losses, gradients in (expected, again))
        for a, b in zip(before, after, strict=True):
            if not torch.equal(a, b) or (a.stride() != b.stride() and not b.is_contiguous()):
                raise ValueError("its results differ")
    except Exception as error:  # make_fx runs any code of a module, and fails with many kinds of errors
        log.debug("a training step cannot be traced: %s", error)
        return None
    return found


def _check(module: fx.GraphModule, own: Sequence[Tensor]) -> None:
    """Check that a traced step holds nothing that would differ in the next step.

    Raises:
        ValueError: it draws random numbers, or reads a tensor that is not in `own`.
    """
    addresses = {tensor.data_ptr() for tensor in own}
    for node in module.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(f"{node.target} draws random numbers")
        if node.op == "get_attr":
            tensor = getattr(module, node.target)
            # scalars are constants of the code; anything larger may be another tensor in the next step
            if tensor.ndim and tensor.data_ptr() not in addresses:
                raise ValueError(f"it reads a tensor of shape {list(tensor.shape)} that is not the module's")


def _simplify(graph: fx.Graph) -> None:
    """Remove operations without effect, and repeated ones."""
    operations = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.target._schema.is_mutable for node in operations if isinstance(node.target, torch._ops.OpOverload)):
        return  # with in-place operations it matters which results share memory
    done: dict[tuple, fx.Node] = {}
    for node in operations:
        instead = _instead(node) or done.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if instead is not node:
            node.replace_all_uses_with(instead)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        _fold_transpose(graph, node)
    graph.eliminate_dead_code()


def _fold_transpose(graph: fx.Graph, node: fx.Node) -> None:
    """Replace (A B)ᵀ by Bᵀ Aᵀ, which is contiguous: gradients of weights are products like this."""
    product = node.args[0] if _is_transpose(node) else None
    if product is None or len(product.users) > 1 or product.target not in _PRODUCTS or not _rounds_alike(product):
        return
    turned = []
    with graph.inserting_before(node):
        for factor in reversed(product.args):
            if _is_transpose(factor):
                turned.append(factor.args[0])
                continue
            turned.append(graph.call_function(aten.transpose.int, (factor, -2, -1)))
            turned[-1].meta["val"] = factor.meta["val"].mT
    node.target, node.args = product.target, tuple(turned)


def _rounds_alike(product: fx.Node) -> bool:
    """Return True if Bᵀ Aᵀ is the transpose of A B to the bit: the order of summation depends on shapes alone."""
    a, b = (
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).normal_(
            generator=torch.Generator(v.device).manual_seed(0)
        )
        for v in (factor.meta["val"] for factor in product.args)
    )
    return torch.equal(product.target(b.mT, a.mT), product.target(a, b).mT)


def _is_transpose(node: fx.Node) -> bool:
    """Return True if a node transposes a matrix, or a batch of them."""
    if node.target is aten.t.default:
        return node.meta["val"].ndim == 2
    if node.target is not aten.transpose.int:
        return False
    rank = node.meta["val"].ndim
    return {dim % rank for dim in node.args[1:]} == {rank - 2, rank - 1}


def _instead(node: fx.Node) -> fx.Node | None:
    """Return the argument that an operation without effect can be replaced by; None for any other operation."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if _is_transpose(node) and _is_transpose(source):
        return source.args[0]
    one = node.target in (aten.mul.Scalar, aten.mul.Tensor) and node.args[1] == 1
    return source if (one or node.target in _SAME) and _kind(node) == _kind(source) else None


def _kind(node: fx.Node) -> tuple:
    value = node.meta["val"]
    return tuple(value.shape), value.dtype


def _as_function(module: fx.GraphModule) -> Callable[..., Results]:
    """Compile a graph to a function that calls torch's operators directly, and frees tensors after their last use.

    The code that `torch.fx` generates looks up every operator, and goes through a wrapper of it, at every call.
    """
    scope: dict[str, Any] = {}

    def named(value: Any) -> str:
        """Return an argument as source code."""
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list | tuple):
            inner = "".join(f"{named(one)}, " for one in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {named(one)}" for key, one in value.items()) + "}"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        scope[f"constant_{len(scope)}"] = value  # a type, a device, a float
        return f"constant_{len(scope) - 1}"

    arguments, lines = [], []
    last = {given: node for node in module.graph.nodes for given in node.all_input_nodes}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            arguments.append(node.name)
        elif node.op == "get_attr":
            scope[node.name] = getattr(module, node.target)
        elif node.op == "call_function":
            scope[f"do__{node.name}"] = getattr(node.target, "_op", node.target)
            given = [named(one) for one in node.args] + [f"{key}={named(one)}" for key, one in node.kwargs.items()]
            lines.append(f"{node.name} = do__{node.name}({', '.join(given)})")
            done = [one.name for one in node.all_input_nodes if last[one] is node and one.op == "call_function"]
            lines += [f"del {name}" for name in dict.fromkeys(done)]
            if not node.users:
                lines.append(f"del {node.name}")
        elif node.op == "output":
            lines.append(f"return {named(node.args[0])}")
        else:
            raise ValueError(f"a {node.op}")
    source = f"def step({', '.join(arguments)}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<training step>", "exec"), scope)
    return scope["step"]
