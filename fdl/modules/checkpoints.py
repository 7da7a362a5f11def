"""Weights from local files, read without running any code that a file may hold."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fdl.errors import UserError

_PICKLED = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
_KNOWN = (".safetensors", ".npz", *sorted(_PICKLED))
# Where training scripts put the weights among other things; averaged weights first, as timm does.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers put before every name: DDP, torch.compile, and our own modules.
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of named weights onto the CPU.

    Args:
        path: ``.safetensors``; ``.npz`` with arrays in torch's layout under torch's names; or a file of torch
            (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.tar``), of which only tensors and plain containers are
            accepted. Weights may lie under ``state_dict``, ``model`` or their averaged forms; a prefix that a wrapper
            gave to all names is taken off. Entries that are no numbers are left out.

    Raises:
        UserError: the file is missing, of another kind, damaged, holds objects other than tensors, or numbers that are
            not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint: no such file: {path}")
    if path.suffix not in _KNOWN:
        raise UserError(f"checkpoint: {path} must end in {', '.join(_KNOWN)}")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        elif path.suffix == ".npz":
            found = {k: torch.from_numpy(v) for k, v in read_arrays(path).items() if v.dtype.kind in "fiub"}
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint: {path} is damaged or holds objects other than tensors: {reason}") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, TypeError, OSError, KeyError) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {error}") from error
    for key in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    weights = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not weights:
        raise UserError(f"checkpoint: {path} holds no named tensors")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    require_finite(weights, f"checkpoint: {path}")
    return weights


def require_finite(weights: Mapping[str, Tensor | np.ndarray], where: str) -> None:
    """Raise where weights to start from hold NaN or infinite numbers.

    Args:
        weights: by name.
        where: what holds them, for the message: a file, or a model of a hub.

    Raises:
        UserError: naming the first tensor that does, and how many of its numbers.
    """
    for name, values in weights.items():
        if isinstance(values, np.ndarray):
            wrong = int((~np.isfinite(values)).sum()) if values.dtype.kind == "f" else 0
        else:
            wrong = int((~torch.isfinite(values)).sum()) if values.is_floating_point() else 0
        if wrong:
            count = math.prod(values.shape)
            raise UserError(
                f"{where}: {wrong:,} of {count:,} numbers in {name} are not finite; a model cannot start so"
            )


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file.

    Raises:
        UserError: the file is missing, damaged, or holds pickled objects or numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    # a file that is no archive at all is taken for a pickle or a single array, and has no `files`
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, BadZipFile) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {error}") from error
    require_finite(arrays, f"checkpoint: {path}")
    return arrays


def load_weights(network: nn.Module, head: str, weights: dict[str, Tensor], path: str, label: str) -> None:
    """Fill a network, whatever numbers of input channels and classes the weights have; the network is changed to them.

    Args:
        network: filled in place; every name has to fit.
        head: dotted name of its classification layer.
        weights: by name.
        path: of their file, for messages.
        label: what to call the network there.

    Raises:
        UserError: a name is missing or left over, or a shape differs.
    """
    layer, stem = weights.get(f"{head}.weight"), weights.get(f"{first_convolution(network)}.weight")
    if layer is None or stem is None or layer.ndim < 2 or stem.ndim != 4:
        raise UserError(f"checkpoint: {path} does not fit {label}: its first or last layer is missing")
    set_inputs(network, stem.shape[1])
    set_outputs(network, head, len(layer))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} does not fit {label}: {brief(error)}") from error


def brief(error: Exception) -> str:
    """An error's text on one line; torch lists every name of a state dict that does not fit, and one tells enough."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def first_convolution(network: nn.Module) -> str:
    """Dotted name of the layer that sees the image."""
    return next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def set_inputs(network: nn.Module, channels: int) -> None:
    """Change the first convolution's input channels; one channel then counts as if it were given three times.

    Raises:
        UserError: the network was made for other than 3 channels.
    """
    from timm.models import adapt_input_conv

    conv = network.get_submodule(first_convolution(network))
    if conv.in_channels == channels:
        return
    if conv.in_channels != 3:
        raise UserError(f"weights for {conv.in_channels} input channels cannot be used with {channels}")
    conv.weight, conv.in_channels = nn.Parameter(adapt_input_conv(channels, conv.weight.detach())), channels


def set_outputs(network: nn.Module, head: str, count: int) -> bool:
    """Give the classification layer another number of outputs, with new weights; returns whether it had to change."""
    layer = network.get_submodule(head)
    if isinstance(layer, nn.Linear):
        if layer.out_features == count:
            return False
        fresh = nn.Linear(layer.in_features, count, bias=layer.bias is not None)
    else:
        if layer.out_channels == count:
            return False
        fresh = nn.Conv2d(layer.in_channels, count, layer.kernel_size, bias=layer.bias is not None)
    owner, _, name = head.rpartition(".")
    setattr(network.get_submodule(owner), name, fresh)
    return True
