"""The Hugging Face hub, asked once whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_SECONDS = 5


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Ask the hub, and without it its cache alone: its own clients try an unreachable hub for most of a minute.

    Yields:
        Why only what was downloaded before can be had, for messages; empty where the hub is there.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    reason = "HF_HUB_OFFLINE is set" if offline else _unreachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = bool(reason)
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = offline


@cache
def _unreachable(endpoint: str) -> str:
    """Why the hub cannot be reached from here, empty where it can; looked at once in a process."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except Exception:  # of several libraries: no name server, no route, a proxy that refuses
        return f"{endpoint} cannot be reached from here"
    return ""
