"""What clients are called whose samples come from natural groups, such as hospitals."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

log = logging.getLogger("fdl")

_NAMED = 12
"""How many clients a message names."""

_TOGETHER = 4
"""How many groups the name of a client names."""


def group_names(parts: Sequence[np.ndarray], groups: np.ndarray) -> list[str]:
    """Name each client after the groups that its samples come from.

    Args:
        parts: indices of each client's samples.
        groups: natural client or domain of each sample, [n] of any type.

    Returns:
        A name a client: ``"a"``, ``"a + b"`` where it has several, ``"a (2/3)"`` where it is the second of three that
        have samples of a.

    Example:
        >>> import numpy as np
        >>> groups = np.array(["paris", "paris", "rome", "oslo"])
        >>> group_names([np.array([0]), np.array([1]), np.array([2, 3])], groups)
        ['paris (1/2)', 'paris (2/2)', 'oslo + rome']
    """
    held = [np.unique(groups[part]).tolist() for part in parts]
    owners = Counter(group for own in held for group in own)
    seen: Counter = Counter()
    names = []
    for own in held:
        seen.update(own)
        words = [f"{g} ({seen[g]}/{owners[g]})" if owners[g] > 1 else str(g) for g in own[:_TOGETHER]]
        names.append(" + ".join(words) + (f" + {len(own) - _TOGETHER} more" if len(own) > _TOGETHER else ""))
    return names


def tell(who: str, parts: Sequence[np.ndarray], groups: np.ndarray) -> None:
    """Say in a warning which client has which groups, where these are not one each.

    Args:
        who: what divided the samples, for the message.
        parts: indices of each client's samples.
        groups: natural client or domain of each sample, [n].
    """
    count, clients = len(np.unique(groups)), len(parts)
    done = "put together" if count > clients else "divided"
    names = [f"client {i}: {name}" for i, name in enumerate(group_names(parts, groups))]
    named = "; ".join(names[:_NAMED]) + (f"; and {clients - _NAMED} more" if clients > _NAMED else "")
    log.warning("%s: %d groups are %s to make %d clients: %s", who, count, done, clients, named)
