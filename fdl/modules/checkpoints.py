"""Weights from local files, read without running any code that a file may hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fdl.errors import UserError

_PICKLED = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
# Where training scripts put the weights among other things; averaged weights first, as timm does.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers put before every name: DDP, torch.compile, and our own modules.
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of named weights onto the CPU.

    Args:
        path: ``.safetensors``, or a file of torch (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.tar``), of which only
            tensors and plain containers are accepted. Weights may lie under ``state_dict``, ``model`` or their
            averaged forms; a prefix that a wrapper gave to all names is taken off.

    Raises:
        UserError: the file is missing, of another kind, damaged, or holds objects other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint: no such file: {path}")
    if path.suffix not in {".safetensors", *_PICKLED}:
        raise UserError(f"checkpoint: {path} must end in .safetensors, {', '.join(sorted(_PICKLED))}")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint: {path} is damaged or holds objects other than tensors: {reason}") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
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
    return weights
