"""Weights from local files, read without running any code that a file may hold."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.state_names import describe_mismatch, find_state_dict, strip_wrapper_prefixes

_PICKLED = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
_KNOWN = (".safetensors", ".npz", *sorted(_PICKLED))
# What training scripts put beside the weights that is no tensor: to make one of these runs no code of the file's.
_HARMLESS = [argparse.Namespace, defaultdict, PosixPath, PurePosixPath, WindowsPath, PureWindowsPath]
_HARMLESS += [np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]


def read_weights(path: str | Path, wanted: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a file of named weights onto the CPU.

    Args:
        path: ``.safetensors``; ``.npz`` with arrays in torch's layout under torch's names; or a file of torch
            (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.tar``), of which only tensors, plain containers and values
            are accepted. Weights may lie under ``state_dict``, ``model`` and other usual names, as in
            `find_state_dict`. Entries that are no numbers are left out.
        wanted: the names of the network that is to have them: prefixes of wrappers are taken off until most of them
            are found, see `strip_wrapper_prefixes`. Without it, those go that are known and before all names.

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
            with torch.serialization.safe_globals([*_HARMLESS, *_numpy_scalars()]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint: {path} is damaged or holds objects other than tensors{_foreign(error)}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, TypeError, OSError, KeyError) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {error}") from error
    weights = find_state_dict(found)
    if not weights:
        held = f"; it has {', '.join(map(repr, list(found)[:6]))}" if isinstance(found, dict) and found else ""
        raise UserError(f"checkpoint: {path} holds no named tensors, or several sets of them{held}")
    require_finite_weights(weights, f"checkpoint: {path}")
    return strip_wrapper_prefixes(weights, wanted, path)


def _numpy_scalars() -> list[Any]:
    """What a pickled number of numpy's is made by: a score beside the weights, say."""
    module = getattr(np, "_core", None) or np.core  # called so before numpy 2
    scalar = module.multiarray.scalar
    return [(scalar, f"numpy.{package}.multiarray.scalar") for package in ("_core", "core")]


def _foreign(error: Exception) -> str:
    """Which object of a file is refused, from torch's page of advice."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    if name is None:
        return ""
    return f" ({name[1]}); save the weights alone, torch.save(model.state_dict(), path), where the file was made"


def require_finite_weights(weights: Mapping[str, Tensor | np.ndarray], where: str) -> None:
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
            known = values.is_floating_point() and not values.is_meta
            wrong = int((~torch.isfinite(values)).sum()) if known else 0
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
    require_finite_weights(arrays, f"checkpoint: {path}")
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
    own = network.state_dict()
    # files of old have no count of batches, as torch itself allows
    weights = {**{n: v for n, v in own.items() if n.endswith("num_batches_tracked") and n not in weights}, **weights}
    layer, stem = weights.get(f"{head}.weight"), weights.get(f"{first_convolution(network)}.weight")
    if layer is None or stem is None or layer.ndim < 2 or stem.ndim != 4:
        wrong = describe_mismatch(weights, own) or "its first or last layer has another shape"
        raise UserError(f"checkpoint: {path} does not fit {label}: its first or last layer is missing: {wrong}")
    set_input_channels(network, stem.shape[1])
    set_num_outputs(network, head, len(layer))
    if wrong := describe_mismatch(weights, network.state_dict()):
        raise UserError(f"checkpoint: {path} does not fit {label}: {wrong}")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} does not fit {label}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An error's text on one line; torch lists every name of a state dict that does not fit, and one tells enough."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def first_convolution(network: nn.Module) -> str:
    """Dotted name of the layer that sees the image."""
    return next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def set_input_channels(network: nn.Module, channels: int) -> None:
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


def set_num_outputs(network: nn.Module, head: str, count: int) -> bool:
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
