"""Cache of frozen models' predictions, by a hash of model, samples and settings."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fdl
from fdl.state.shards import local_shard

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples


log = logging.getLogger("fdl")


class PredictionCache:
    """Keeps predictions in memory across rounds and, given a folder, on disk across runs.

    The key hashes the weights, the settings of all parts of the model, the content of the samples, and the settings of
    inference: a model that has been trained in the meantime has another key.

    Args:
        folder: folder of stored predictions; None keeps them in memory only. Runs may share it.
        limit: bytes kept in memory; the least recently used are evicted first.
    """

    def __init__(self, folder: str | Path | None = None, limit: int = 2 << 30):
        self.folder, self.limit = None if folder is None else Path(folder).expanduser(), limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def key(self, module: nn.Module, samples: Samples, what: Any, how: Iterable[Any] = ()) -> str | None:
        """Return the key of some predictions.

        Args:
            module: the model.
            samples: the samples.
            what: the field of `Output`, or a function that is defined at the top level of a file or class.
            how: further settings that change predictions, e.g. precision and batch size.

        Returns:
            A hex digest; None for functions without a unique name.
        """
        if not isinstance(what, str):
            # the result of a bound method or a closure depends on more than its name
            if not isinstance(what, FunctionType) or what.__closure__ or "<" in what.__qualname__:
                return None
            what = f"{what.__module__}:{what.__qualname__}"
        settings = (fdl.__version__, torch.__version__, what, *how)
        return _hashed(repr(settings), fingerprint(module), samples.content_hash())

    def get(self, key: str, count: int) -> Tensor | None:
        """Return stored predictions.

        Args:
            key: the result of `key`.
            count: expected number of rows.

        Returns:
            float32 [count, …], a copy; None if there are none, or the file is damaged.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].clone()
        answers = self._read(key, count)
        if answers is not None:
            self._keep(key, answers)
            return answers.clone()
        return None

    def put(self, key: str, answers: Tensor) -> None:
        """Store predictions; if the folder cannot be written to, log a warning and continue.

        Args:
            key: the result of `key`.
            answers: the predictions, float32 [n, …] on the CPU.
        """
        self._keep(key, answers.clone())
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            os.close(handle)
            try:
                save_file({"answers": answers.contiguous()}, name, metadata={"blake2b": _hashed(_bytes(answers))})
                os.replace(name, self._file(key))  # atomic: no reader sees a partial file
            finally:
                Path(name).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            log.warning("%s: answers are not stored: %s", self.folder, error)

    def _read(self, key: str, count: int) -> Tensor | None:
        if self.folder is None or not self._file(key).is_file():
            return None
        path = self._file(key)
        try:
            with safe_open(path, framework="pt") as file:
                answers, expected = file.get_tensor("answers"), (file.metadata() or {}).get("blake2b")
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read and is made again: %s", path, error)
            return None
        if answers.dtype != torch.float32 or len(answers) != count or _hashed(_bytes(answers)) != expected:
            log.warning("%s is damaged and is made again", path)
            return None
        return answers

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _keep(self, key: str, answers: Tensor) -> None:
        self._kept[key] = answers
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self.limit:
            self._kept.popitem(last=False)
        if answers.nbytes > self.limit:
            self._kept.pop(key)


def fingerprint(module: nn.Module) -> str:
    """Hash everything that a model's predictions depend on: weights, buffers, and the plain settings of all its parts.

    Settings distinguish models with equal weights, e.g. by the number of heads or the size that images are resized to.

    Args:
        module: the model.
    """
    parts: list[str | memoryview] = []
    for name, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training" and _is_plain(v)}
        parts.append(f"{name} {type(part).__module__}.{type(part).__qualname__} {sorted(plain.items())}")
    for kind in (module.named_parameters(), module.named_buffers()):
        for name, tensor in kind:
            parts += [f"{name} {tensor.dtype} {list(tensor.shape)}", _bytes(tensor)]
    return _hashed(*parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _bytes(tensor: Tensor) -> memoryview:
    flat = local_shard(tensor.detach()).cpu().contiguous().flatten()
    return memoryview((flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)).numpy())


def _hashed(*parts: str | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
