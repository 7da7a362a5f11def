"""Selection of the trained part of a pretrained network: all of it, its head, low-rank updates, or nothing.

Frozen weights are the same at every site and never change, so they are neither sent nor stored: every function here
that freezes parameters returns their names in the state dict.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fdl.errors import UserError
from fdl.modules.checkpoints import require_finite_weights
from fdl.modules.features import matching_submodules
from fdl.utils.libraries import library
from fdl.utils.suggest import suggest

TUNINGS = ("full", "head", "frozen", "lora")
"""Kinds of tuning that `apply_tuning` accepts."""

_LORA = {"rank": 8, "alpha": None, "dropout": 0.0, "targets": None, "init": "kaiming", "freeze_a": False}


def apply_tuning(
    network: nn.Module,
    tuning: str,
    head_names: Sequence[str] = (),
    lora: Mapping[str, Any] | None = None,
    *,
    pretrained: bool = True,
    train_head: bool = True,
) -> frozenset[str]:
    """Freeze the untrained parts of a network, and add low-rank updates if requested.

    Call it after all weights have been loaded. Call `keep_frozen_in_eval` on the network whenever it is put into
    training mode.

    Args:
        network: network, changed in place.
        tuning: ``"full"`` trains everything; ``"head"`` the head alone; ``"frozen"`` nothing; ``"lora"`` adds
            trainable low-rank matrices to linear layers: ``W x + (alpha / rank) B A x``, with B = 0 initially.
        head_names: dotted names of the submodules or parameters that form the head.
        lora: settings of ``"lora"``: ``rank`` (8), ``alpha`` (default twice the rank), ``dropout`` (0) of the matrices'
            input, ``targets`` (names or globs of layers; default every linear layer except the head), ``init`` of A
            (``"kaiming"`` or ``"gaussian"``), and ``freeze_a`` (false), which trains B alone, so that the mean of
            several sites' products is the product of their means. Sources: Hu et al., "LoRA: Low-Rank Adaptation of
            Large Language Models"; Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA).
        pretrained: True if the weights come from a file or a hub, and so are the same at every site.
        train_head: train the head in full besides ``"lora"``, as a new head requires.

    Returns:
        Names in ``network.state_dict()`` that never change.

    Raises:
        UserError: `tuning` is unknown, settings of LoRA are not valid, random weights would be frozen, or pretrained
            weights are not finite.
    """
    if tuning not in TUNINGS:
        raise UserError(f"tuning must be one of {', '.join(TUNINGS)}, got {tuning!r}")
    if lora is not None and tuning != "lora":
        raise UserError(f"lora is for tuning: lora, not for tuning: {tuning}")
    if pretrained:  # weights from a file were checked when they were read, weights from a hub were not
        require_finite_weights(network.state_dict(), f"the pretrained weights of {type(network).__name__}")
    if tuning == "full":
        return frozenset()
    if not pretrained:
        raise UserError(
            f"tuning: {tuning} needs pretrained weights, here are none: parts that are not trained are not sent "
            "either, and random ones would differ from site to site; give pretrained or checkpoint, or tuning: full"
        )
    if tuning == "lora":
        _add_lora(network, head_names, {**_LORA, **_check_lora_settings(lora or {})})
    else:
        network.requires_grad_(False)
    if tuning == "head" or (tuning == "lora" and train_head):
        for name in head_names:
            for parameter in _parameters_of(network, name):
                parameter.requires_grad_(True)
    keep_frozen_in_eval(network)
    return frozen_names(network)


def keep_frozen_in_eval(network: nn.Module) -> None:
    """Put the frozen parts of a network into evaluation mode.

    This disables their dropout, and freezes the running statistics of their batch normalisations, which change without
    gradients. A submodule without parameters and buffers keeps the mode of its parent.

    Args:
        network: network, changed in place.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.eval()
        return
    for child in network.children():
        if any(True for _ in _tensors(child)):
            keep_frozen_in_eval(child)


def frozen_names(network: nn.Module) -> frozenset[str]:
    """Return the names of a network's state that never change: frozen parameters, and buffers of frozen submodules.

    Args:
        network: network after `apply_tuning`.
    """
    changing = {
        name
        for name, module in network.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters())
    }
    return frozenset(
        name
        for name, value in network.state_dict(keep_vars=True).items()
        if not (value.requires_grad if isinstance(value, nn.Parameter) else name.rpartition(".")[0] in changing)
    )


def merge_lora(network: nn.Module) -> nn.Module:
    """Merge the low-rank matrices into the weights that they update, and remove them.

    Args:
        network: network, changed in place; unchanged if it has no such matrices.

    Returns:
        The network, with the names that it had before `apply_tuning`.
    """
    for name, layer in list(network.named_modules()):
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            layer.merge()
            _replace(network, name, layer.get_base_layer())
    return network


def linear_layers(network: nn.Module) -> list[str]:
    """List the layers that LoRA supports: linear ones, and those of GPT-2, which are implemented as convolutions.

    Layers of ``nn.MultiheadAttention`` are excluded, because it uses their weights without calling them.

    Args:
        network: network whose layers are listed.
    """
    owners = [f"{name}." for name, m in network.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return [
        name
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) or _is_conv1d(module)) and not name.startswith(tuple(owners))
    ]


def _add_lora(network: nn.Module, head_names: Sequence[str], settings: dict[str, Any]) -> None:
    peft = library("peft", "peft", "tuning: lora", has="inject_adapter_in_model")
    rank, alpha = settings["rank"], settings["alpha"]
    chosen = _lora_targets(network, head_names, settings["targets"])
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=settings["dropout"],
        target_modules="|".join(map(re.escape, chosen)),  # a list would also match the ends of names
        init_lora_weights=True if settings["init"] == "kaiming" else "gaussian",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPT-2's transposed weights, which peft handles
        peft.inject_adapter_in_model(config, network)
    if settings["freeze_a"]:
        for name, layer in network.named_modules():
            if name.endswith(".lora_A.default"):
                _fix_lora_a(layer.weight, name, settings["init"], rank)


@torch.no_grad()
def _fix_lora_a(weight: nn.Parameter, name: str, init: str, rank: int) -> None:
    """Initialise a frozen matrix from a random stream seeded by its name, so that it is the same at every site."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if init == "kaiming":
        nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
    else:
        nn.init.normal_(weight, std=1 / rank, generator=generator)
    weight.requires_grad_(False)


def _lora_targets(network: nn.Module, head_names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    able = linear_layers(network)
    if patterns is None:
        chosen = [
            name for name in able if not any(_is_part_of(name, head) or _is_part_of(head, name) for head in head_names)
        ]
        if not chosen:
            raise UserError("lora: the network has no linear layers but its head, and LoRA is for linear layers")
        return chosen
    try:
        named = matching_submodules(network, patterns)
    except UserError as error:
        raise UserError(f"lora.targets: {str(error).removeprefix('features: ')}") from error
    chosen = [name for name in named if name in able]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in chosen):
            raise UserError(f"lora.targets: {pattern!r} names no linear layer that LoRA can be added to")
    return chosen


def _check_lora_settings(lora: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check the settings of LoRA from a recipe, and return them."""
    for key in lora:
        if key not in _LORA:
            raise UserError(f"lora takes no {key!r}{suggest(str(key), _LORA)}")
    rank, init, targets = lora.get("rank", 8), lora.get("init", "kaiming"), lora.get("targets")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"lora.rank must be a whole number above 0, got {rank!r}")
    if init not in ("kaiming", "gaussian"):
        raise UserError(f"lora.init must be kaiming or gaussian, got {init!r}")
    if isinstance(targets, str) or (targets is not None and not targets):
        raise UserError(f"lora.targets must be a list of names or globs of layers, got {targets!r}")
    return lora


def _parameters_of(network: nn.Module, name: str) -> list[nn.Parameter]:
    named = network.named_parameters(remove_duplicate=False)
    found = [parameter for own, parameter in named if _is_part_of(own, name)]
    if not found:
        raise ValueError(f"the head {name!r} has no parameters")
    return found


def _is_part_of(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(network.get_submodule(owner), last, module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D"
