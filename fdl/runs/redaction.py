"""Redaction of recipes for publication: removal of local paths and file names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

LOCAL = "<local path>"
"""Replacement of a path."""

_KEYS = {"path", "root", "folder", "file", "files", "output_dir", "checkpoint", "keys", "cache", "data_dir"}
_PUBLIC = re.compile(r"(hub|hf-hub|hf_hub|open_clip):[\w./@:-]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE = re.compile(
    r".*\.(npz|npy|csv|tsv|jsonl|json|parquet|txt|md|tar|gz|zip|pth?|ckpt|bin|safetensors|onnx|ya?ml|bpe|model|pkl)",
    re.IGNORECASE,
)


def without_paths(value: Any, key: str = "") -> Any:
    """Copy a tree with local paths replaced; hub ids, names and numbers are kept.

    Args:
        value: plain dicts, lists and values.
        key: the key of the value in its mapping.

    Example:
        >>> without_paths({"path": "/home/ana/scans.npz", "model": "google/vit-base-patch16-224"})
        {'path': '<local path>', 'model': 'google/vit-base-patch16-224'}
    """
    if isinstance(value, Mapping):
        return {name: without_paths(one, str(name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one, key) for one in value]
    return LOCAL if isinstance(value, str) and _is_local(value, key) else value


def _is_local(text: str, key: str) -> bool:
    if _PUBLIC.fullmatch(text) or key in ("target", "backbone"):
        return False
    if key in _KEYS or _FILE.fullmatch(text) or text.startswith(("local-dir:", "~", "file:")):
        return bool(text)
    if "/" not in text and "\\" not in text:
        return False
    here = Path(text).expanduser()
    absolute = here.is_absolute() or PureWindowsPath(text).is_absolute()
    # a text with the form of a hub's id is one, unless such a file exists
    return absolute or here.exists() or not _HUB_ID.fullmatch(text)
