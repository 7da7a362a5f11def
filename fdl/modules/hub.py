"""Access to the Hugging Face hub, or to its local cache if it cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_SECONDS = 5


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Probe the Hugging Face hub, and use only its local cache if it cannot be reached.

    The hub's own client retries an unreachable hub for most of a minute.

    Yields:
        The reason why only the cache is used, for error messages; empty if the hub is reachable.
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
    """Return the reason why the hub is unreachable, empty if it is reachable; probed once per process."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except Exception:  # raised by several libraries: no name server, no route, a proxy that rejects
        return f"{endpoint} cannot be reached from here"
    return ""
