"""Reading of weights from local files, without executing code that a file may contain."""

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
# objects that training scripts save next to the weights; constructing them executes no code from the file
_HARMLESS = [argparse.Namespace, defaultdict, PosixPath, PurePosixPath, WindowsPath, PureWindowsPath]
_HARMLESS += [np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]


def read_weights(path: str | Path, wanted: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a file of named weights onto the CPU.

    Args:
        path: ``.safetensors``; ``.npz`` with arrays in torch's layout under torch's names; or a file of torch
            (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.tar``), of which only tensors, plain containers and values
            are accepted. Weights may be stored under ``state_dict``, ``model`` and other common keys, see
            `find_state_dict`. Non-numeric entries are dropped.
        wanted: names of the network that is to be filled: prefixes of wrappers are removed so that most of these names
            are found, see `strip_wrapper_prefixes`. Without it, known prefixes that all names share are removed.

    Raises:
        UserError: the file is missing, of an unsupported format, damaged, contains objects other than tensors, or
            numbers that are not finite.
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
    """Return the constructors of pickled numpy scalars, e.g. of a score saved next to the weights."""
    module = getattr(np, "_core", None) or np.core  # the name before numpy 2
    scalar = module.multiarray.scalar
    return [(scalar, f"numpy.{package}.multiarray.scalar") for package in ("_core", "core")]


def _foreign(error: Exception) -> str:
    """Return the rejected object of a file, extracted from torch's long error message, with advice."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    if name is None:
        return ""
    return f" ({name[1]}); save the weights alone, torch.save(model.state_dict(), path), where the file was made"


def require_finite_weights(weights: Mapping[str, Tensor | np.ndarray], where: str) -> None:
    """Check that initial weights contain no NaN and no infinite numbers.

    Args:
        weights: tensors or arrays by name.
        where: origin of the weights, for the message: a file, or a model of a hub.

    Raises:
        UserError: a number is not finite; the message names the first such tensor, and counts its wrong numbers.
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

    Args:
        path: path of the file.

    Raises:
        UserError: the file is missing, damaged, or holds pickled objects or numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    # numpy treats a file that is no archive as a pickle or a single array, which has no `files`
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, BadZipFile) as error:
        raise UserError(f"checkpoint: {path} cannot be read: {error}") from error
    require_finite_weights(arrays, f"checkpoint: {path}")
    return arrays


def load_weights(network: nn.Module, head: str, weights: dict[str, Tensor], path: str, label: str) -> None:
    """Load weights into a network, whose numbers of input channels and classes are changed to those of the weights.

    Args:
        network: destination, changed in place; names must match exactly.
        head: dotted name of its classification layer.
        weights: tensors by name.
        path: path of their file, for messages.
        label: name of the network in error messages.

    Raises:
        UserError: a name is missing or unexpected, or a shape differs.
    """
    own = network.state_dict()
    # old files have no count of batches, which torch itself accepts
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
    """Return an error's message on one line of at most 300 characters; torch's may list every name of a state dict.

    Args:
        error: exception whose message is shortened.
    """
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def first_convolution(network: nn.Module) -> str:
    """Return the dotted name of the first convolution, which receives the image.

    Args:
        network: network with at least one convolution.
    """
    return next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def set_input_channels(network: nn.Module, channels: int) -> None:
    """Change the number of input channels of the first convolution; a single channel is treated as if repeated thrice.

    Args:
        network: network, changed in place.
        channels: new number of input channels.

    Raises:
        UserError: the number changes, and the network was made for other than 3 channels.
    """
    from timm.models import adapt_input_conv

    conv = network.get_submodule(first_convolution(network))
    if conv.in_channels == channels:
        return
    if conv.in_channels != 3:
        raise UserError(f"weights for {conv.in_channels} input channels cannot be used with {channels}")
    conv.weight, conv.in_channels = nn.Parameter(adapt_input_conv(channels, conv.weight.detach())), channels


def set_num_outputs(network: nn.Module, head: str, count: int) -> bool:
    """Set the number of outputs of the classification layer, with new weights if it changes.

    Args:
        network: network, changed in place.
        head: dotted name of its classification layer.
        count: new number of outputs.

    Returns:
        True if the layer was replaced.
    """
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
